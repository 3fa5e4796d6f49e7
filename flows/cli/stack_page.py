"""The page of a stack: what runs, at which address, and how a shell uses it; as text and as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from flows.cli.stack import STAND_IN, Stack
from infra.supervisor import State

ABOUT = {
    "postgres": "the databases of Prefect and MLflow",
    "s3": "the object store of MLflow's artifacts, in memory: a stop loses them",
    "ray": "the Ray head and its dashboard",
    "prefect": "runs, logs, schedules and forms of the flows",
    "mlflow": "curves, reports and registered models",
    "deployments": "the work pool and the deployments of prefect.yaml",
    "worker": "runs the flows that are scheduled",
    "metrics": "Prometheus metrics of the stages, and which services run",
    "model": "animates photos with the champion: web UI, API, metrics",
}
# Where the password of each service is that asks for one.
LOGIN = {
    "prefect": "trip:PASSWORD; the password is prefect in secrets.json",
    "mlflow": "user trip; the password is mlflow in secrets.json",
    "ray": "the token is in ray.token",
    "model": "the key is model in secrets.json",
}


def text_page(stack: Stack, states: Sequence[State]) -> str:
    """The page for a terminal."""
    address = {service.name: service.address for service in stack.services}
    rows = [(s.name, s.status, f"for {s.reason}" if s.reason else address[s.name]) for s in states]
    lines = [f"  {name:<12} {status:<10} {where}".rstrip() for name, status, where in rows]
    more = [
        f"  page         {stack.folder}/index.html",
        f"  use          source {stack.folder}/client.env",
        f"  passwords    {stack.folder}/secrets.json",
        f"  logs         {stack.folder}/NAME/log",
    ]
    return "\n".join([f"Services ({stack.settings.database}, artifacts in {artifacts(stack)}):", *lines, *more])


def artifacts(stack: Stack) -> str:
    """Where MLflow's artifacts are, in words."""
    if stack.settings.s3 == STAND_IN:
        return "a stand-in for S3 in memory"
    return f"{stack.settings.s3}/{stack.settings.bucket}" if stack.settings.s3 else "the folder"


def write_page(stack: Stack, states: Sequence[State]) -> None:
    """Writes index.html into the folder of the stack; it contains no secret."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_HTML)
    address = {service.name: service.address for service in stack.services}
    rows = [(state, address[state.name], ABOUT[state.name], LOGIN.get(state.name, "")) for state in states]
    text = template.render(
        rows=rows, folder=str(stack.folder), database=stack.settings.database, where=artifacts(stack)
    )
    (stack.folder / "index.html").write_text(text, encoding="utf-8")


_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>TRIP: services of this machine</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2530 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .5rem .75rem; vertical-align: top }
tr + tr { border-top: 1px solid #d7dde5 } code, pre { background: #f2f4f7; padding: .1rem .3rem; border-radius: .2rem }
pre { padding: .75rem; overflow-x: auto } small { color: #566274 }
.healthy, .done { color: #1a7f4b } .stopped, .unhealthy { color: #b3261e } .waits { color: #8a5a00 }
</style>
<h1>Services of this machine</h1>
<table>
<tr><th>Service<th>State<th>Address</tr>
{% for state, address, about, login in rows %}
<tr><td><b>{{ state.name }}</b><br><small>{{ about }}</small>
<td class="{{ state.status }}">{{ state.status }}
{% if state.reason %}<br><small>for {{ state.reason }}</small>{% endif %}
<td>{% if address.startswith("http") %}<a href="{{ address }}">{{ address }}</a>{% else %}{{ address }}{% endif %}
{% if login %}<br><small>{{ login }}</small>{% endif %}</tr>
{% endfor %}
</table>
<p>Database: {{ database }}. Artifacts: {{ where }}. Passwords: <code>{{ folder }}/secrets.json</code>.
Logs: <code>{{ folder }}/NAME/log</code>.</p>
<p>Use these services from a shell, start a run, and stop everything:</p>
<pre>source {{ folder }}/client.env
python -m prefect deployment run reproduce/reproduce
python -m flows down --folder {{ folder }}</pre>
</html>
"""
