"""The page to play with: drop a photo, write what should move, watch the steps go by, keep the clips of the session."""

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

from tasks.serve.gateway import Desk
from tasks.serve.limits import MAX_IMAGE_BYTES, MAX_PROMPT_CHARACTERS, MAX_REST_BYTES, Refusal, read_animation
from tasks.serve.messages import Clip, Progress

KEPT_SECONDS = 3600  # photos and clips of the page on this machine
WAITING = 64  # visitors in line; more are told so

UPLOAD = "/gradio_api/upload"
MAX_UPLOAD_BYTES = MAX_IMAGE_BYTES + 2**12  # with the form around it
PAGE_PATHS = re.compile(
    r"/|/(login|logout|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(static|assets|svelte)/.*"
    r"|/gradio_api/(upload|upload_progress|queue/join|queue/data|reset|cancel|login_check|app_id|startup-events|info"
    r"|theme\.css)/?|/gradio_api/heartbeat/\w+|/gradio_api/file=(?!\w+:).*"
)

# Shown until the model has told its own.
DEFAULTS = {"steps": 50, "guidance": 1, "num_frames": 16, "fps": 4}

# Fonts of the visitor's own system, so that the page asks nothing of anybody else; labels as plain words.
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
    block_info_text_color="*neutral_600",  # the theme's own is too pale to read
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    input_placeholder_color="*neutral_500",
    button_primary_background_fill="*primary_700",  # white on it can be read
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


def mount_page(app: FastAPI, desk: Desk, key: str | None = None) -> FastAPI:
    """Puts the page at `/`; with a `key`, visitors log in with it as their password."""

    def known(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), (key or "").encode())

    page = build_page(desk)
    page.has_launched = True  # mounting does not say so, and until then Gradio reads any file that a request names
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=THEME,
        css=CSS,
        auth=known if key else None,
        auth_message="Write any name; the password is the service's API key." if key else None,
        max_file_size=MAX_IMAGE_BYTES,
        footer_links=[],
        run_history=False,  # Gradio's own would keep photos in the visitor's browser
        ssr_mode=False,
    )
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    mount.app = _PageOnly(mount.app, app)
    return app


class _PageOnly:
    """Lets through to Gradio what the page needs of it, in sizes that the page sends; all else it has is refused."""

    def __init__(self, gradio: ASGIApp, app: FastAPI) -> None:
        self._gradio, self._app = gradio, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # The mount takes what the service's own routes refuse for their method.
        for route in self._app.routes[:-1]:
            if route.matches(scope)[0] == Match.PARTIAL:
                await route.handle(scope, receive, send)
                return
        if not PAGE_PATHS.fullmatch(path):
            raise HTTPException(404, "there is no such page")
        if scope["method"] not in ("GET", "HEAD"):
            length = Headers(scope=scope).get("content-length", "")
            most = MAX_UPLOAD_BYTES if path == UPLOAD else MAX_REST_BYTES
            if not length.isdecimal():
                raise HTTPException(411, "the body has no Content-Length")
            if int(length) > most:
                raise HTTPException(413, f"the body has {length} bytes; the page sends at most {most}")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Gradio's login is meant for pages inside of other sites.
                message["headers"] = [
                    (name, re.sub(rb"(?i)samesite=none", b"SameSite=lax", value) if name == b"set-cookie" else value)
                    for name, value in message["headers"]
                ]
            await send(message)

        await self._gradio(scope, receive, answer)


def _opened_by_us(image: gr.Image) -> gr.Image:
    """The same, but Gradio gives the path of what was sent, does not open it, and asks no address for it.

    Not a subclass: for each one Gradio writes an interface file beside the source.
    """
    move = image.async_move_resource_to_block_cache

    async def move_own(url_or_file_path: str | Path | None) -> str | None:
        if is_http_url_like(str(url_or_file_path)):
            raise gr.Error("Send the photo itself, not its address.", title="Not this one", print_exception=False)
        return await move(url_or_file_path)

    image.preprocess = lambda payload: payload.path if payload else None
    image.async_move_resource_to_block_cache = move_own
    return image


def build_page(desk: Desk) -> gr.Blocks:
    async def animate(
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
            raise gr.Error("Choose a photo first.", title="No photo", print_exception=False)
        numbers: dict[str, Any] = {"steps": steps, "guidance": guidance, "num_frames": frames, "fps": fps}
        if seed and seed.strip():
            numbers["seed"] = seed
        try:
            animation = read_animation({"image": Path(photo).read_bytes(), "prompt": prompt, **numbers})
        except Refusal as refusal:
            raise gr.Error(desk.refused(refusal).message, title="Not this one", print_exception=False) from refusal
        try:
            clip = await _watched(desk.clip(animation), progress)
        except Refusal as refusal:
            raise gr.Error(refusal.message, title="No clip", print_exception=False) from refusal
        # In Gradio's own folder it is removed with what visitors have sent.
        file = save_bytes_to_cache(clip.files[0], f"trip-{clip.seed}.mp4", shown.GRADIO_CACHE)
        clips = [(file, animation.prompt, clip.seed), *clips]
        return file, _facts(clip), clips, _history(clips), clip.seed, gr.Button(visible=True)

    async def defaults() -> list[float]:
        status = await desk.animators.status()
        return [status.defaults.get(name, value) for name, value in DEFAULTS.items()]

    with gr.Blocks(title="TRIP", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        clips, last_seed = gr.State([]), gr.State(None)
        gr.Markdown("# A photo, set in motion\nYour photo is the first frame; the sentence says what happens next.",
                    elem_id="title")  # fmt: skip
        with gr.Row(equal_height=False):
            with gr.Column():
                photo = _opened_by_us(gr.Image(
                    label="Photo", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=320,
                    elem_id="photo",
                ))  # fmt: skip
                prompt = gr.Textbox(
                    label="What should happen?", placeholder="a red circle moving right slowly", lines=1, max_lines=4,
                    max_length=MAX_PROMPT_CHARACTERS, submit_btn=False, elem_id="prompt",
                )  # fmt: skip
                go = gr.Button("Animate", variant="primary", size="lg", elem_id="animate")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    # A number field that is left empty would send 0, and browsers round numbers above 2**53.
                    seed = gr.Textbox(label="Seed", info="Empty draws a new one; the same seed makes the same clip.",
                                      max_lines=1, elem_id="seed")  # fmt: skip
                    steps = gr.Slider(1, 100, 50, step=1, label="Steps", info="More take longer and are finer.",
                                      elem_id="steps")  # fmt: skip
                    guidance = gr.Slider(0, 15, 1, step=0.5, label="Guidance", elem_id="guidance",
                                         info="How closely the clip follows the sentence; 1 is off.")  # fmt: skip
                    frames = gr.Slider(2, 64, 16, step=1, label="Frames", elem_id="frames")
                    fps = gr.Slider(1, 30, 4, step=1, label="Frames per second", elem_id="fps")
            with gr.Column():
                shown = gr.Video(label="Clip", height=420, autoplay=True, loop=True, interactive=False,
                                buttons=["download"], elem_id="clip")  # fmt: skip
                facts = gr.Markdown("", elem_id="facts")
                keep = gr.Button("Keep this seed", size="sm", visible=False, elem_id="keep")
        history = gr.HTML(elem_id="history")
        gr.on(
            [go.click, prompt.submit],
            animate,
            [photo, prompt, seed, steps, guidance, frames, fps, clips],
            [shown, facts, clips, history, last_seed, keep],
            concurrency_limit=None,
            show_progress_on=shown,
            api_visibility="private",
        )
        # On a phone the clip lies below the window.
        gr.on([go.click, prompt.submit], None, js=SHOW_CLIP, api_visibility="private")
        keep.click(str, last_seed, seed, api_visibility="private")
        page.load(defaults, None, [steps, guidance, frames, fps], show_progress="hidden", api_visibility="private")
    return page.queue(max_size=WAITING)


async def _watched(events: AsyncGenerator[Progress | Clip, None], progress: gr.Progress) -> Clip:
    async for event in events:
        if isinstance(event, Clip):
            return event
        if event.step:
            progress((event.step, event.steps), desc="Denoising", unit="steps")
        else:
            progress(0, desc="Waiting for its turn")
    raise AssertionError("no clip and no refusal")


def _history(clips: list[tuple[str, str, int]]) -> str:
    """The clips of a session, newest first, each to be played and to be kept."""
    shown = "".join(
        f'<figure><video src="gradio_api/file={quote(file)}#t=0.01" muted loop playsinline controls></video>'
        f'<figcaption>{escape(prompt)}<br>seed {seed} · <a href="gradio_api/file={quote(file)}" '
        f'download="trip-{seed}.mp4">download</a></figcaption></figure>'
        for file, prompt, seed in clips
    )
    return f'<h2>This session</h2><div class="clips">{shown}</div>'


def _facts(clip: Clip) -> str:
    return (
        f"Seed **{clip.seed}** · {clip.num_frames} frames · {clip.steps} steps · guidance {clip.guidance:g} · "
        f"{clip.model} version {clip.version} · {clip.seconds:.1f}\u00a0s"
    )
