"""The services of one machine: PostgreSQL or SQLite, Prefect, MLflow, Ray, a worker, the model service."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from signal import Signals
from typing import Any
from urllib.parse import quote

from infra.metrics import FOLDER_VARIABLE
from infra.ray_sessions import STACK_FOLDERS, mark_stack, temporary_folder
from infra.settings import CHECKOUT, MODEL_NAME, QUIET, SERVICE_ADDRESS, SERVICE_KEY, TELEMETRY_OFF, code_version
from infra.supervisor import Service, responds
from tasks.records import UserError

# The ports that users know, where they are free; a free one otherwise. Ray's workers take theirs from the system.
PORTS = {
    "postgres": 5432,
    "s3": 9000,
    "prefect": 4200,
    "mlflow": 5000,
    "ray": 6379,
    "ray-dashboard": 8265,
    "ray-client": 10001,
    "ray-agent": 52365,
    "ray-agent-grpc": 52366,
    "ray-metrics": 8090,
    "worker": 8080,
    "model": 8000,
    "metrics": 9464,
}
POOL = "trip-local"
BUCKET = "trip"
STAND_IN = "moto"
DATABASES = ("prefect", "mlflow", "mlflow_auth")  # one for each; the role of the same name owns it
S3_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION")
# Prefect's worker and server end in an orderly way on SIGINT.
PREFECT_STOP = Signals.SIGINT
LOOPBACK = "127.0.0.1"
KEPT_SESSIONS = 3  # of Ray, with their logs; each start makes another
ADOPTING = ("worker",)  # its flow runs go on after its death


@dataclass(frozen=True)
class Settings:
    """What a stack keeps from its first start on, in `stack.json`.

    Attributes:
        database: `postgresql` or `sqlite`.
        s3: the endpoint of the object store of MLflow's artifacts, `moto` for a stand-in in memory, "" for a folder.
        bucket: the bucket of the artifacts.
        cpus: processors of the Ray head.
        ports: the port of each service.
    """

    database: str
    s3: str
    bucket: str
    cpus: int
    ports: dict[str, int] = field(default_factory=dict)


class Stack:
    """The services of a folder, with their settings and secrets.

    Args:
        folder: absolute path of the stack.
        settings: the ports, the database and the object store.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings

    @cached_property
    def secrets(self) -> dict[str, str]:
        """The passwords by name, made once, in a file that only its owner can read."""
        path = self.folder / "secrets.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        names = [f"postgres-{name}" for name in ("admin", *DATABASES)]
        names += ["prefect", "mlflow", "mlflow-session", "ray", "model"]
        made = {name: secrets.token_urlsafe(24) for name in names} | known
        if self.settings.s3 == STAND_IN:
            stand_in = {"AWS_ACCESS_KEY_ID": "trip", "AWS_SECRET_ACCESS_KEY": made["mlflow-session"]}
            made |= stand_in | {"AWS_DEFAULT_REGION": "us-east-1"}
        elif self.settings.s3:
            made |= {name: os.environ[name] for name in S3_VARIABLES if name in os.environ}
        if made != known:
            write_private(path, json.dumps(made, indent=1))
        return made

    def url(self, name: str) -> str:
        """The address of a service on loopback."""
        return f"http://{LOOPBACK}:{self.settings.ports[name]}"

    @cached_property
    def client_environment(self) -> dict[str, str]:
        """The variables with which a command on this machine uses the stack."""
        values = {
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "PREFECT_API_AUTH_STRING": f"trip:{self.secrets['prefect']}",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_TRACKING_USERNAME": "trip",
            "MLFLOW_TRACKING_PASSWORD": self.secrets["mlflow"],
            "RAY_ADDRESS": f"{LOOPBACK}:{self.settings.ports['ray']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "ray.token"),
            "NO_PROXY": f"{LOOPBACK},localhost",
            "no_proxy": f"{LOOPBACK},localhost",
        }
        return values | self._s3_environment

    @cached_property
    def services(self) -> list[Service]:
        """The services in the order of their dependencies."""
        services = [*self._databases(), *self._object_store(), self._ray(), self._prefect(), self._mlflow()]
        services += [self._deployments(), self._worker(), self._model(), self._metrics()]
        known = {service.name for service in services}
        return [replace(s, after=tuple(name for name in s.after if name in known)) for s in services]

    def write_files(self) -> None:
        """Writes the files of secrets that services and clients read: mode 0600, again at every start."""
        write_private(self.folder / "ray.token", self.secrets["ray"])
        port = self.settings.ports["postgres"]
        lines = [f"{LOOPBACK}:{port}:{name}:{name}:{self.secrets[f'postgres-{name}']}" for name in DATABASES]
        write_private(self.folder / "pgpass", "\n".join(lines) + "\n")
        lines = [f"export {name}='{value}'" for name, value in self.client_environment.items()]
        write_private(self.folder / "client.env", "\n".join(lines) + "\n")
        config = f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {self._database('mlflow_auth')}\n"
        config += "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        (self.folder / "mlflow_auth.ini").write_text(config)

    @property
    def _plain(self) -> dict[str, str]:
        """Variables of every service: telemetry off, quiet, no proxy for loopback."""
        more = {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), *_python_path()])}
        proxy = dict.fromkeys(("NO_PROXY", "no_proxy"), f"{LOOPBACK},localhost")
        return TELEMETRY_OFF | QUIET | proxy | more

    @property
    def _s3_environment(self) -> dict[str, str]:
        if not self.settings.s3:
            return {}
        endpoint = self.url("s3") if self.settings.s3 == STAND_IN else self.settings.s3
        keys = {name: self.secrets[name] for name in S3_VARIABLES if name in self.secrets}
        return keys | {"AWS_ENDPOINT_URL": endpoint, "MLFLOW_S3_ENDPOINT_URL": endpoint}

    def _database(self, name: str, driver: str = "") -> str:
        """The address of a database; PostgreSQL's passwords are in the file that PGPASSFILE names."""
        if self.settings.database == "postgresql":
            return f"postgresql{driver}://{name}@{LOOPBACK}:{self.settings.ports['postgres']}/{name}"
        return f"sqlite{driver and '+aiosqlite'}:///{self.folder}/{name}.db"

    def _databases(self) -> list[Service]:
        if self.settings.database == "sqlite":
            return []
        data = self.folder / "postgres" / "data"
        port = self.settings.ports["postgres"]
        user = postgres_user()

        def make() -> None:
            if (data / "PG_VERSION").exists():
                return
            data.parent.chmod(0o711)
            shutil.rmtree(data, ignore_errors=True)  # of an initdb that was interrupted
            data.mkdir()
            password = data.parent / "admin"
            write_private(password, self.secrets["postgres-admin"])
            if user:
                shutil.chown(data, user)
                shutil.chown(password, user)
            command = [postgres_program("initdb"), "-D", str(data), "-U", "trip", "-A", "scram-sha-256"]
            command += ["-E", "UTF8", "--no-locale", f"--pwfile={password}"]
            run = subprocess.run(command, capture_output=True, text=True, cwd="/", user=user or None)
            password.unlink()
            if run.returncode:
                raise UserError(f"initdb failed in {data}: {run.stderr.strip()[-300:]}")

        def connect() -> Any:
            import psycopg2

            password = self.secrets["postgres-admin"]
            return psycopg2.connect(
                host=LOOPBACK, port=port, user="trip", password=password, dbname="postgres", connect_timeout=2
            )

        def responds_to_queries() -> bool:
            import psycopg2

            try:
                connect().close()
            except psycopg2.OperationalError:
                return False
            return True

        def make_databases() -> None:
            connection = connect()
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT datname FROM pg_database")
                existing = {row[0] for row in cursor.fetchall()}
                for name in DATABASES:
                    if name not in existing:
                        cursor.execute(f"DROP ROLE IF EXISTS {name}")
                        cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD %s", [self.secrets[f"postgres-{name}"]])
                        cursor.execute(f"CREATE DATABASE {name} OWNER {name}")
            connection.close()

        command = (postgres_program("postgres"), "-D", str(data), "-p", str(port), "-h", LOOPBACK)
        return [
            Service(
                "postgres",
                (*command, "-c", "unix_socket_directories="),
                is_healthy=responds_to_queries,
                prepare=make,
                when_healthy=make_databases,
                address=f"postgresql://{LOOPBACK}:{port}",
                stop_signal=Signals.SIGINT,  # does not wait for clients that are still connected
                user=user,
            )
        ]

    def _object_store(self) -> list[Service]:
        if self.settings.s3 != STAND_IN:
            return []
        url = self.url("s3")

        def make_bucket() -> None:
            request = urllib.request.Request(f"{url}/{self.settings.bucket}", method="PUT")
            _open(request).close()

        command = (sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(self.settings.ports["s3"]))
        healthy = _responds(f"{url}/moto-api/")
        return [Service("s3", command, self._plain, is_healthy=healthy, when_healthy=make_bucket, address=url)]

    def _ray(self) -> Service:
        ports = self.settings.ports
        flags = {
            "node-ip-address": LOOPBACK,
            "port": ports["ray"],
            "dashboard-host": LOOPBACK,
            "dashboard-port": ports["ray-dashboard"],
            "dashboard-agent-listen-port": ports["ray-agent"],
            "dashboard-agent-grpc-port": ports["ray-agent-grpc"],
            "ray-client-server-port": ports["ray-client"],
            "metrics-export-port": ports["ray-metrics"],
            "num-cpus": self.settings.cpus,
            "object-store-memory": 300 * 1024 * 1024,
            "temp-dir": ray_folder(self.folder),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "ray.token")}
        # Actors of Ray Train ask the state API, which needs an address where several sessions run on the machine.
        access |= {"RAY_ADDRESS": f"{LOOPBACK}:{ports['ray']}"}
        return Service(
            "ray",
            tuple(command),
            # Workers import the code of the driver, whose path they get; another one here would mix two commits.
            self._plain | access | self._s3_environment | {"PYTHONPATH": os.pathsep.join(_python_path())},
            # The head without its raylet takes no work; Ray gives up on a raylet that needs 30 s to start.
            is_healthy=lambda: (
                responds(f"{self.url('ray-dashboard')}/api/gcs_healthz")
                and responds(f"{self.url('ray-agent')}/api/local_raylet_healthz")
            ),
            prepare=self._prepare_ray,
            address=self.url("ray-dashboard"),
            tries=2,
        )

    def _prepare_ray(self) -> None:
        folder = Path(ray_folder(self.folder))
        remove_old_sessions(folder)
        mark_stack(folder, self.folder)

    def _prefect(self) -> Service:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK]
        url = self.url("prefect")
        return Service(
            "prefect",
            (*command, "--port", str(self.settings.ports["prefect"])),
            self._plain
            | {
                "PREFECT_HOME": str(self.folder / "prefect"),
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": self._database("prefect", "+asyncpg"),
                "PGPASSFILE": str(self.folder / "pgpass"),
                "PREFECT_SERVER_API_AUTH_STRING": f"trip:{self.secrets['prefect']}",
                "PREFECT_API_URL": f"{url}/api",
                "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            },
            after=("postgres",),
            is_healthy=_responds(f"{url}/api/health"),
            address=url,
            stop_signal=PREFECT_STOP,
        )

    def _mlflow(self) -> Service:
        command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--workers", "1"]
        command += ["--port", str(self.settings.ports["mlflow"]), "--app-name", "basic-auth"]
        artifacts = f"s3://{self.settings.bucket}/mlflow" if self.settings.s3 else str(self.folder / "mlflow-artifacts")
        command += ["--artifacts-destination", artifacts]
        url = self.url("mlflow")
        return Service(
            "mlflow",
            tuple(command),
            self._plain
            | self._s3_environment
            | {
                "MLFLOW_BACKEND_STORE_URI": self._database("mlflow"),
                "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "mlflow_auth.ini"),
                "MLFLOW_AUTH_ADMIN_USERNAME": "trip",
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.secrets["mlflow"],
                "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secrets["mlflow-session"],
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "PGPASSFILE": str(self.folder / "pgpass"),
            },
            after=("postgres", "s3"),
            is_healthy=_responds(f"{url}/health"),
            address=url,
        )

    def _deployments(self) -> Service:
        # A run executes the files of the deployed commit; a checkout with changes of its own is deployed as it is.
        version = code_version()
        pinned = not version.endswith("-dirty") and version != "unknown"
        client = {name: value for name, value in self.client_environment.items() if name.startswith("PREFECT_")}
        command = (sys.executable, "-m", "flows", "deploy", "--roots", str(self.folder.parent))
        files = " ".join(map(hash_of, (CHECKOUT / "prefect.yaml", CHECKOUT / "infra" / "work_pool_process.json")))
        return Service(
            "deployments",
            command if pinned else (*command, "--in-place"),
            self._plain | client | {"TRIP_DEPLOYED": f"{version} {files}"},  # another commit is deployed again
            after=("prefect",),
        )

    def _worker(self) -> Service:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
        port = str(self.settings.ports["worker"])
        extra = {"PREFECT_WORKER_WEBSERVER_HOST": LOOPBACK, "PREFECT_WORKER_WEBSERVER_PORT": port}
        extra |= {"PREFECT_WORKER_QUERY_SECONDS": "5", "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks,infra,trip_model"}
        # For smoke-test, which follows a promotion.
        extra |= {SERVICE_ADDRESS: self.url("model"), SERVICE_KEY: self.secrets["model"]}
        extra |= {FOLDER_VARIABLE: str(self.folder / "metrics" / "stages")}
        return Service(
            "worker",
            (*command, "--name", "trip-worker", "--with-healthcheck"),
            self._plain | self.client_environment | extra,
            after=("deployments", "mlflow", "ray"),
            is_healthy=_responds(f"{self.url('worker')}/health"),
            address="",
            stop_signal=PREFECT_STOP,
            adopts=True,
        )

    def _model(self) -> Service:
        port = self.settings.ports["model"]
        client = {name: value for name, value in self.client_environment.items() if not name.startswith("RAY_")}
        command = (sys.executable, "-m", "flows", "serve", "--tracking-uri", self.url("mlflow"), "--port", str(port))
        return Service(
            "model",
            command,
            self._plain | client | {SERVICE_KEY: self.secrets["model"]},
            after=("mlflow",),
            is_healthy=_responds(f"{self.url('model')}/readyz"),
            missing=lambda: "" if self.has_champion() else f"a champion of {MODEL_NAME!r} in the registry",
            address=self.url("model"),
        )

    def _metrics(self) -> Service:
        command = (sys.executable, "-m", "infra.metrics_server", "--folder", str(self.folder / "metrics" / "stages"))
        url = f"{self.url('metrics')}/metrics"
        return Service(
            "metrics",
            (*command, "--stack", str(self.folder), "--port", str(self.settings.ports["metrics"])),
            self._plain,
            is_healthy=_responds(url),
            address=url,
        )

    def has_champion(self) -> bool:
        """Whether the registry has a version that the model service can load."""
        user = base64.b64encode(f"trip:{self.secrets['mlflow']}".encode()).decode()
        query = f"name={quote(MODEL_NAME)}&alias=champion"
        url = f"{self.url('mlflow')}/api/2.0/mlflow/registered-models/alias?{query}"
        return responds(url, {"Authorization": f"Basic {user}"})


def load(folder: Path) -> Stack:
    """The stack of a folder. Raises UserError if there is none."""
    path = folder / "stack.json"
    if not path.exists():
        raise UserError(f"no stack in {folder}; start one with the command up")
    return Stack(folder, Settings(**json.loads(path.read_text())))


def prepare(folder: Path, database: str, s3: str | None, bucket: str, cpus: int | None) -> Stack:
    """The stack of a folder with the given settings; what is not given stays as it is, or is chosen.

    Raises:
        UserError: a setting cannot be used here, or the database of existing data would change.
    """
    if not Path("/proc/self/stat").exists():
        raise UserError("the command up finds processes in /proc, which this system does not have; use Linux")
    if importlib.util.find_spec("flask_wtf") is None:
        raise UserError("MLflow's login needs flask-wtf, which is not installed; run: pip install flask-wtf")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    path = folder / "stack.json"
    known = Settings(**json.loads(path.read_text())) if path.exists() else None
    if database == "auto":
        database = known.database if known else usable_database(folder)
    if known is not None and database != known.database:
        raise UserError(f"the stack in {folder} uses {known.database}; give another --folder for {database}")
    s3 = (known.s3 if known else "") if s3 is None else s3
    if s3 == STAND_IN and importlib.util.find_spec("moto") is None:
        raise UserError("moto is not installed; install it with pip install 'moto[server]', or give another --s3")
    if s3 and s3 != STAND_IN and not s3.startswith(("http://", "https://")):
        raise UserError(f"--s3 {s3}: expected the http address of an endpoint, or {STAND_IN}")
    settings = Settings(
        database,
        s3,
        bucket or (known.bucket if known else BUCKET),
        cpus or (known.cpus if known else os.cpu_count() or 1),
        dict(known.ports) if known else {},
    )
    return Stack(folder, settings)


def choose_ports(stack: Stack, running: set[str]) -> None:
    """Chooses the ports of the services that do not run: the known ones where they are free.

    Args:
        stack: its settings are changed and written.
        running: names of the services that run.
    """
    ports = stack.settings.ports
    for name, preferred in PORTS.items():
        if name.removesuffix("-dashboard").split("-")[0] in running:
            continue
        others = {port for other, port in ports.items() if other != name}
        candidates = [port for port in (ports.get(name), preferred) if port and port not in others]
        ports[name] = next(filter(is_free, candidates), 0) or free_port(others)
    (stack.folder / "stack.json").write_text(json.dumps(asdict(stack.settings), indent=1))


def is_free(port: int) -> bool:
    """Whether a port of loopback can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def free_port(taken: set[int]) -> int:
    """A free port of loopback outside of Ray's range for workers (10002 to 19999)."""
    while True:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        if port not in taken and not 10002 <= port <= 19999:
            return port


def usable_database(folder: Path) -> str:
    """`postgresql` where its programs and driver are installed and its account can reach the folder."""
    if importlib.util.find_spec("psycopg2") is None or not postgres_program("initdb"):
        return "sqlite"
    closed = [path for path in (folder, *folder.parents) if not path.stat().st_mode & 0o001]
    return "sqlite" if postgres_user() and closed else "postgresql"


def postgres_program(name: str) -> str:
    """The path of a program of PostgreSQL, of its newest version; "" if it is not installed."""

    def version(path: Path) -> float:
        return float(path.parent.name) if path.parent.name.replace(".", "").isdigit() else 0.0

    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=version, reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])) or ""


def postgres_user() -> str:
    """The account of PostgreSQL, which refuses to run as root; "" for the account of this process."""
    if os.geteuid() != 0:
        return ""
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def ray_folder(folder: Path) -> str:
    """The folder of Ray's sessions; in the system's temporary folder if its sockets would have too long a path."""
    inside = str(folder / "ray-session")
    if len(inside) <= 40:  # sockets add 66 characters, and their path has at most 107
        return inside
    return str(temporary_folder() / f"{STACK_FOLDERS}{hash_of(str(folder).encode())[:12]}")


def remove_old_sessions(folder: Path) -> None:
    """Removes the sessions of Ray in a folder but the newest; none of them runs when Ray is about to start."""
    sessions = sorted(path for path in folder.glob("session_*") if path.is_dir() and not path.is_symlink())
    for session in sessions[: -(KEPT_SESSIONS - 1)]:
        shutil.rmtree(session, ignore_errors=True)


def hash_of(content: Path | bytes) -> str:
    """sha256 of a file or of bytes."""
    import hashlib

    return hashlib.sha256(content.read_bytes() if isinstance(content, Path) else content).hexdigest()


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(fresh, path)


def _python_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _responds(url: str) -> Callable[[], bool]:
    return lambda: responds(url)


def _open(request: urllib.request.Request) -> Any:
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10)
