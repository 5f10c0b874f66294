"""The application around a scripted engine, for a real Ray; run as a script it is `serve`.

python served.py PORT FAULT    FAULT: "", or what a replica's start raises
"""

import asyncio
import itertools
import sys

import standins

from deployments.app import assemble
from deployments.cli.serve import serve_config
from select_n_core.config import DeployConfig, HTTPOptions, ModelConfig, parse_args
from select_n_core.engine.messages import FinishReason, Output
from select_n_core.errors import InfeasibleError, SelectNError


class Endless(standins.ScriptedEngine):
    """Never stops by itself; a token every 20 ms."""

    async def _outputs(self, request):
        for number in itertools.count(1):
            await asyncio.sleep(0.02)
            if self._closing.is_set():
                yield self._error(request, standins.EngineError("the engine is shutting down"))
                return
            last = number == request.sampling.max_tokens
            yield Output(request.id, (65,), finish=FinishReason.LENGTH if last else None)
            if last:
                return

    def stats(self):
        running = len(self.requests) - len(self.cancelled)
        return standins.EngineStats(running=running, waiting=len(self.cancelled))

    async def close(self, *, grace_s=0.0):
        await asyncio.sleep(grace_s)
        await super().close()


async def load(model: ModelConfig):
    text = standins.codec()
    if model.source == "infeasible":
        raise InfeasibleError("no N meets 100 ms; give more device_memory", reason="slo")
    if model.source == "broken":
        raise RuntimeError("it fell over")
    return text, Endless(text)


def build(args: dict):
    return assemble(parse_args(args), load)


def config(port: int, source: str) -> DeployConfig:
    serve = standins.args(source=source)
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "serve",
                "route_prefix": "/",
                "import_path": "served:build",
                "args": serve.model_dump(mode="json"),
            }
        ],
    }
    return DeployConfig(document=document, http=HTTPOptions(port=port), serve=serve)


if __name__ == "__main__":
    try:
        serve_config(config(int(sys.argv[1]), sys.argv[2] or "endless"))
    except SelectNError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
