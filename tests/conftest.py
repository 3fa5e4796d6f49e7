"""What several tests share: a tiny base folder, an untrained TRIP on it, and S3, PostgreSQL and MLflow on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported: on tiny models more threads than one only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_CLIPS = REPOSITORY.parent / "shared" / "data" / "clips" / "manifest.csv"
DEMO_BASE = REPOSITORY / "examples" / "demo_base" / "weights"


@contextlib.contextmanager
def restored_mlflow_address() -> Iterator[None]:
    """Restores MLflow's addresses, which its client keeps in the environment and in the module: no test finds them."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_REGISTRY_URI")
    before = {name: os.environ.get(name) for name in names}
    yield
    if "mlflow.tracking" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
        sys.modules["mlflow"].set_registry_uri(None)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True, scope="module")
def mlflow_address_of_a_module() -> Iterator[None]:
    """Ends the addresses that a module's fixtures set."""
    with restored_mlflow_address():
        yield


@pytest.fixture(autouse=True)
def mlflow_address_of_a_test(mlflow_address_of_a_module: None) -> Iterator[None]:
    """Ends the addresses that a test sets."""
    with restored_mlflow_address():
        yield


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The table of 25 real captioned videos, where the checkout has them beside it."""
    if not REAL_CLIPS.is_file():
        pytest.skip(f"no real clips at {REAL_CLIPS}")
    return REAL_CLIPS


# A 3D-UNet of a few thousand parameters, for 4 by 4 latents and a text width of 16.
TINY_UNET: dict[str, Any] = {
    "sample_size": 4,
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def make_tiny_base(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A random base of a few thousand parameters: 32x32 pixels, 4x4 latents, 16-wide text."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    state = torch.get_rng_state()
    torch.manual_seed(0)
    UNet3DConditionModel(**TINY_UNET).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    ).save_pretrained(folder / "vae")
    shutil.copytree(DEMO_BASE / "tokenizer", folder / "tokenizer")
    vocabulary = len(json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary + 2,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(folder / "text_encoder")
    DDIMScheduler(clip_sample=False, prediction_type=prediction_type).save_pretrained(folder / "scheduler")
    torch.set_rng_state(state)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a tiny base folder: unet/ vae/ text_encoder/ tokenizer/ scheduler/."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_velocity_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base, but its scheduler says that the 3D-UNet predicts velocity."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny-velocity") / "base", "v_prediction")


@pytest.fixture(scope="session")
def tiny_model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of an exported, untrained TRIP model folder on the tiny base."""
    from trip_model.checkpoint import save_model
    from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
    from trip_model.model import Trip

    fusion = FusionConfig(width=16, heads=2, prediction="shrinkage", residual="unit")  # as the demo's
    config = TripConfig(size=32, fusion=fusion, schedule=ScheduleConfig(sampling_steps=2), guidance=1.0)
    return save_model(tmp_path_factory.mktemp("tiny") / "model", Trip.from_base(tiny_base, config), tiny_base)


@pytest.fixture
def s3_folder() -> Iterator[str]:
    """An address on an S3 endpoint of its own, on loopback."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        bucket = f"clips-{uuid.uuid4().hex[:8]}"
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}/data"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address for a data set that is not there yet, in each kind of store."""
    if request.param == "s3":
        return request.getfixturevalue("s3_folder")
    return str(tmp_path / "set") if request.param == "local" else f"memory://{uuid.uuid4().hex}/set"


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Address of a PostgreSQL database of its own, on loopback; skipped where PostgreSQL is not installed."""
    pytest.importorskip("psycopg2")
    folders = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    search = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    initdb, server = shutil.which("initdb", path=search), shutil.which("postgres", path=search)
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    # It refuses to run as root, and pytest's own folders are closed to others.
    other = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="trip-postgres-") as home:
        if other:
            shutil.chown(home, **other)
        data = f"{home}/data"
        make = [initdb, "-D", data, "-U", "trip", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, cwd=home, **other)
        run = [server, "-D", data, "-p", str(port), "-k", home, "-h", "127.0.0.1", "-c", "fsync=off"]
        with open(f"{home}/log", "wb") as log:
            process = subprocess.Popen(run, stdout=log, stderr=log, cwd=home, **other)
        try:
            wait_for_port(port, process)
            yield f"postgresql+psycopg2://trip@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # does not wait for clients that are still connected
            process.wait(30)


@pytest.fixture
def mlflow_server(postgres: str, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Starts an MLflow server of two processes on an empty PostgreSQL database, given where its artifacts go."""
    import psycopg2

    servers: list[subprocess.Popen[bytes]] = []

    def start(artifacts: str) -> str:
        database, port = f"mlflow_{uuid.uuid4().hex[:8]}", free_port()
        connection = psycopg2.connect(postgres.replace("+psycopg2", ""))
        connection.autocommit = True
        connection.cursor().execute(f"create database {database}")
        connection.close()
        store = postgres.replace("/postgres", f"/{database}")
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "2", "--port", str(port)]
        command += ["--backend-store-uri", store, "--artifacts-destination", artifacts]
        with open(tmp_path / "server.log", "wb") as log:
            environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            servers.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True)
            )
        wait_for_port(port, servers[-1])
        return f"http://127.0.0.1:{port}"

    yield start
    for server in servers:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args} did not come up: code {process.poll()}")
