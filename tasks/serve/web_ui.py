"""The web UI: takes a photo and a prompt, shows progress and the clip, and lists the clips of the session."""

from __future__ import annotations

import hmac
import re
from collections.abc import AsyncGenerator
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from fastapi import FastAPI
from gradio.processing_utils import save_bytes_to_cache
from gradio_client.utils import is_http_url_like
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.serve.gateway import Gateway
from tasks.serve.limits import MAX_REST_BYTES, Refusal, read_animation
from tasks.serve.messages import Clip, Progress
from trip_model.request_limits import BOUNDS, MAX_PHOTO_BYTES, MAX_PROMPT_CHARACTERS

KEPT_SECONDS = 3600  # until photos and clips of the web UI are removed from this machine
WAITING = 64  # submissions in the queue; further ones are refused

UPLOAD = "/gradio_api/upload"
MAX_UPLOAD_BYTES = MAX_PHOTO_BYTES + 2**12  # with the form around it
# The routes of Gradio that the web UI uses; docs/decisions/serving.md says which of them require the key.
ROUTES = (
    *("/", "/login", "/logout", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *("/static/{path}", "/assets/{path}", "/svelte/{path}"),
    *(f"/gradio_api/{name}" for name in ("upload", "upload_progress", "queue/join", "queue/data", "reset", "cancel")),
    *(f"/gradio_api/{name}" for name in ("login_check", "app_id", "startup-events", "info", "theme.css")),
    *("/gradio_api/heartbeat/{session}", "/gradio_api/file={file}"),
)
_VARIABLES = {"{path}": ".*", "{session}": r"\w+", "{file}": r"(?!\w+:).*"}  # a file, not a URL


def _pattern(route: str) -> str:
    parts = re.split(r"({\w+})", route)
    return "".join(_VARIABLES.get(part) or re.escape(part) for part in parts) + ("/?" if route != "/" else "")


PATHS = re.compile("|".join(map(_pattern, ROUTES)))

# Shown until the model's own values are known.
DEFAULTS = {"steps": 50, "guidance": 1, "num_frames": 16, "fps": 4}

# System fonts, so that the browser sends requests to this service only.
THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="stone",
    radius_size="lg",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    block_border_width="1px",
    block_border_color="*neutral_200",
    block_border_color_dark="*neutral_700",
    input_border_width="1px",
    input_border_color="*neutral_300",
    input_border_color_dark="*neutral_600",
    block_label_background_fill="*block_background_fill",
    block_label_background_fill_dark="*block_background_fill",
    block_label_text_color="*body_text_color",
    block_label_text_color_dark="*body_text_color",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_title_padding="0",
    block_info_text_color="*neutral_600",  # the contrast of the theme's own is too low
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    input_placeholder_color="*neutral_500",
    button_primary_background_fill="*primary_700",  # enough contrast for white text
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)
CSS = """
.gradio-container { background: transparent !important; width: 100% !important;
  max-width: 1080px !important; margin: 0 auto !important; padding: 1.5rem 1rem 3rem !important }
#title h1 { font-weight: 650; letter-spacing: -.02em; margin: 0 0 .2rem }
#title p { opacity: .8; margin: 0 }
:is(button, input, textarea, select, video, a, [tabindex]):focus-visible {
  outline: 3px solid var(--primary-500) !important; outline-offset: 2px !important }
#facts { min-height: 1.5rem; opacity: .85 }
#history .clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem }
#history h2 { font-size: 1rem; font-weight: 600; margin: .5rem 0 .75rem }
#history figure { margin: 0 }
#history video { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: var(--radius-lg); display: block }
#history figcaption { font-size: .8rem; line-height: 1.35; margin-top: .35rem; overflow-wrap: anywhere }
footer { display: none !important }
"""

SHOW_CLIP = "() => { document.getElementById('clip').scrollIntoView({block: 'nearest'}) }"


def mount_web_ui(app: FastAPI, gateway: Gateway, key: str | None = None) -> FastAPI:
    """Mounts the web UI at `/`; with a `key`, it requires a login with the key as password."""

    def is_key(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), (key or "").encode())

    page = build_web_ui(gateway)
    page.has_launched = True  # mounting does not set it, and without it Gradio reads any file that a request names
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=THEME,
        css=CSS,
        auth=is_key if key else None,
        auth_message="Enter any name. The password is the API key of the service." if key else None,
        max_file_size=MAX_PHOTO_BYTES,
        footer_links=[],
        run_history=False,  # Gradio's run history keeps photos in the browser
        ssr_mode=False,
    )
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    mount.app = _Allowlist(mount.app, app)
    return app


class _Allowlist:
    """Passes to Gradio only requests of the paths and sizes that the web UI uses; refuses others."""

    def __init__(self, gradio: ASGIApp, app: FastAPI) -> None:
        self._gradio, self._app = gradio, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # Requests that the service's own routes refuse because of the method arrive at the mount.
        for route in self._app.routes[:-1]:
            if route.matches(scope)[0] == Match.PARTIAL:
                await route.handle(scope, receive, send)
                return
        if not PATHS.fullmatch(path):
            raise HTTPException(404, "not found")
        if scope["method"] not in ("GET", "HEAD"):
            length = Headers(scope=scope).get("content-length", "")
            maximum = MAX_UPLOAD_BYTES if path == UPLOAD else MAX_REST_BYTES
            if not length.isdecimal():
                raise HTTPException(411, "the body has no Content-Length")
            if int(length) > maximum:
                raise HTTPException(413, f"the body has {length} bytes; at most {maximum} are accepted")

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Gradio sets the login cookie for pages embedded in other sites.
                message["headers"] = [
                    (name, re.sub(rb"(?i)samesite=none", b"SameSite=lax", value) if name == b"set-cookie" else value)
                    for name, value in message["headers"]
                ]
            await send(message)

        await self._gradio(scope, receive, respond)


def _without_preprocessing(image: gr.Image) -> gr.Image:
    """Makes Gradio pass on the path of the uploaded file, without opening it and without fetching URLs.

    Not a subclass: Gradio writes an interface file next to the source of each one.
    """
    move = image.async_move_resource_to_block_cache

    async def move_upload(url_or_file_path: str | Path | None) -> str | None:
        if is_http_url_like(str(url_or_file_path)):
            raise _error("Upload the photo itself, not its address.")
        return await move(url_or_file_path)

    image.preprocess = lambda payload: payload.path if payload else None
    image.async_move_resource_to_block_cache = move_upload
    return image


def _error(message: str) -> gr.Error:
    return gr.Error(message, title="Request rejected", print_exception=False)


def build_web_ui(gateway: Gateway) -> gr.Blocks:
    async def submit(
        photo: str | None,
        prompt: str,
        seed: str | None,
        steps: float,
        guidance: float,
        frames: float,
        fps: float,
        clips: list[tuple[str, str, int]],
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio finds it in the signature
    ) -> tuple[Any, ...]:
        if photo is None:
            raise _error("Choose a photo first.")
        numbers: dict[str, Any] = {"steps": steps, "guidance": guidance, "num_frames": frames, "fps": fps}
        if seed and seed.strip():
            numbers["seed"] = seed
        try:
            animation = read_animation(
                {"image": Path(photo).read_bytes(), "prompt": prompt, **numbers}, gateway.max_steps
            )
        except Refusal as refusal:
            raise _error(gateway.count_refusal(refusal).message) from refusal
        try:
            clip = await _last_message(gateway.stream(animation), progress)
        except Refusal as refusal:
            raise _error(refusal.message) from refusal
        # Gradio removes the files of its cache after `KEPT_SECONDS`.
        file = save_bytes_to_cache(clip.files[0], f"trip-{clip.seed}.mp4", shown.GRADIO_CACHE)
        clips = [(file, animation.prompt, clip.seed), *clips]
        return file, _facts(clip), clips, _history(clips), clip.seed, gr.Button(visible=True)

    async def model_values() -> list[Any]:
        status = await gateway.backend.status()
        values = {name: status.defaults.get(name, value) for name, value in DEFAULTS.items()}
        most = min(gateway.max_steps, status.max_steps or gateway.max_steps)
        return [gr.Slider(value=values.pop("steps"), maximum=most), *values.values()]

    def slider(name: str, step: float, label: str, elem_id: str, info: str | None = None) -> gr.Slider:
        bound = BOUNDS[name]
        maximum = gateway.max_steps if name == "steps" else bound.maximum
        return gr.Slider(bound.minimum, maximum, DEFAULTS[name], step=step, label=label, info=info, elem_id=elem_id)

    with gr.Blocks(title="TRIP", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        clips, last_seed = gr.State([]), gr.State(None)
        gr.Markdown("# Animate a photo\nYour photo becomes the first frame. Describe what should move.",
                    elem_id="title")  # fmt: skip
        with gr.Row(equal_height=False):
            with gr.Column():
                photo = _without_preprocessing(gr.Image(
                    label="Photo", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=320,
                    elem_id="photo",
                ))  # fmt: skip
                prompt = gr.Textbox(
                    label="Prompt", placeholder="a red circle moving right slowly", lines=1, max_lines=4,
                    max_length=MAX_PROMPT_CHARACTERS, submit_btn=False, elem_id="prompt",
                )  # fmt: skip
                go = gr.Button("Animate", variant="primary", size="lg", elem_id="animate")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    # Text: an empty number field sends 0, and browsers round numbers above 2**53.
                    seed = gr.Textbox(label="Seed", info="The same seed gives the same clip. Empty: random.",
                                      max_lines=1, elem_id="seed")  # fmt: skip
                    steps = slider("steps", 1, "Steps", "steps", "More steps take longer and give finer clips.")
                    guidance = slider("guidance", 0.5, "Guidance", "guidance",
                                      "How closely the clip follows the prompt; 1 is off.")  # fmt: skip
                    frames = slider("num_frames", 1, "Frames", "frames")
                    fps = slider("fps", 1, "Frames per second", "fps")
            with gr.Column():
                shown = gr.Video(label="Clip", height=420, autoplay=True, loop=True, interactive=False,
                                buttons=["download"], elem_id="clip")  # fmt: skip
                facts = gr.Markdown("", elem_id="facts")
                keep = gr.Button("Use this seed again", size="sm", visible=False, elem_id="keep")
        history = gr.HTML(elem_id="history")
        gr.on(
            [go.click, prompt.submit],
            submit,
            [photo, prompt, seed, steps, guidance, frames, fps, clips],
            [shown, facts, clips, history, last_seed, keep],
            concurrency_limit=None,
            show_progress_on=shown,
            api_visibility="private",
        )
        # On a phone the clip is below the visible part.
        gr.on([go.click, prompt.submit], None, js=SHOW_CLIP, api_visibility="private")
        keep.click(str, last_seed, seed, api_visibility="private")
        page.load(model_values, None, [steps, guidance, frames, fps], show_progress="hidden", api_visibility="private")
    return page.queue(max_size=WAITING)


async def _last_message(messages: AsyncGenerator[Progress | Clip, None], progress: gr.Progress) -> Clip:
    """Shows progress and returns the clip. Raises `Refusal`."""
    async for message in messages:
        if isinstance(message, Clip):
            return message
        if message.step:
            progress((message.step, message.steps), desc="Denoising", unit="steps")
        else:
            progress(0, desc="Waiting in the queue")
    raise AssertionError("no clip and no refusal")


def _history(clips: list[tuple[str, str, int]]) -> str:
    """Returns HTML with the clips of a session, newest first, each with a download link."""
    figures = "".join(
        f'<figure><video src="gradio_api/file={quote(file)}#t=0.01" muted loop playsinline controls></video>'
        f'<figcaption>{escape(prompt)}<br>seed {seed} · <a href="gradio_api/file={quote(file)}" '
        f'download="trip-{seed}.mp4">download</a></figcaption></figure>'
        for file, prompt, seed in clips
    )
    return f'<h2>Clips of this session</h2><div class="clips">{figures}</div>'


def _facts(clip: Clip) -> str:
    return (
        f"Seed **{clip.seed}** · {clip.num_frames} frames · {clip.steps} steps · guidance {clip.guidance:g} · "
        f"{clip.model} version {clip.version} · {clip.seconds:.1f}\u00a0s"
    )
