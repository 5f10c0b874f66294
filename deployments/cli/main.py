"""The command `select-n`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from deployments.cli import options
from deployments.cli.output import BAD_INPUT, FAILED, emit, run
from select_n_core.config import HTTPOptions

commands = typer.Typer(
    name="select-n",
    help="Serve large language models from GPUs that are too small for them, within the latency "
    "you promised.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Source = Annotated[
    str, typer.Argument(help="demo:smollm2-135m-instruct, a Hugging Face directory or a hub id.")
]
LinkOption = Annotated[
    Any,
    typer.Option("--link", parser=options.link, metavar="LINK", help="cuda or emulated:1GB/s."),
]
DTypeOption = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")]
UnitsOption = Annotated[
    str, typer.Option("--units", help="What moves as one: a layer, or half (of one).")
]
_HTTP = HTTPOptions()
DEFAULT_URL = f"http://{_HTTP.host}:{_HTTP.port}"
Config = Annotated[Path, typer.Argument(help="A configuration file, for example quickstart.yaml.")]


@commands.command("profile")
def profile_command(
    source: Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the record here too.")
    ] = None,
    link: LinkOption = "emulated:1GB/s",
    dtype: DTypeOption = "bfloat16",
    units: UnitsOption = "layer",
    brief: Annotated[
        bool, typer.Option("--brief", help="A fifth of the effort, and no verdict on the fit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on this machine and write its performance record."""
    from deployments.cli.offline import profile, profile_lines

    summary = profile(source, link, dtype, units, output, brief=brief)
    emit(summary, profile_lines(summary), as_json=as_json)


@commands.command("plan")
def plan_command(
    record: Annotated[Path, typer.Argument(help="A record that `profile` wrote.")],
    tpot: Annotated[
        float,
        typer.Option(parser=options.positive_seconds, metavar="TIME", help="Target, e.g. 100ms."),
    ],
    device_memory: Annotated[
        int,
        typer.Option(
            parser=options.positive_bytes, metavar="SIZE", help="Device arena, e.g. 256MiB."
        ),
    ],
    host_memory: Annotated[
        int,
        typer.Option(parser=options.some_bytes, metavar="SIZE", help="For mirrors, e.g. 1GiB."),
    ],
    ttft: Annotated[
        float,
        typer.Option(parser=options.positive_seconds, metavar="TIME", help="Target, e.g. 2s."),
    ] = "2s",  # type: ignore[assignment]
    prompt_tokens: Annotated[int, typer.Option(help="Of the typical request.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Of the typical request.")] = 64,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second expected; default: all it can do.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Running requests at most.")] = 16,
    slots: Annotated[int, typer.Option(help="Slots of the staging ring (d).")] = 2,
    interval: Annotated[str, typer.Option(help="auto, off or a fixed N.")] = "auto",
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw TPOT, host memory, KV and goodput against N into this file."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Points for the plot, as benchmarks.law prints them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose N from a record, the targets and the memory; exit code 2 if nothing fits."""
    from deployments.cli.offline import plan_document, plan_lines, plan_record

    _, inputs, plan = plan_record(
        record,
        slo={"tpot": tpot, "ttft": ttft},
        device_memory=device_memory,
        host_memory=host_memory,
        workload={"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "rate": rate},
        max_batch=max_batch,
        max_step_tokens=max(256, max_batch),
        slots=slots,
        interval=interval,
    )
    if plot is not None:
        from deployments.cli.plot import draw_plan

        draw_plan(plan, inputs, plot, measured)
    emit(plan_document(plan, inputs), plan_lines(plan, inputs), as_json=as_json)
    if not plan.feasible:
        typer.echo(f"error: {plan.reason}: {plan.message}", err=True)
        raise typer.Exit(BAD_INPUT)


@commands.command("check")
def check_command(config: Config, as_json: AsJson = False) -> None:
    """Do everything `serve` does before it loads weights, and print the plan."""
    from deployments.cli.offline import check, plan_document
    from select_n_core.config import load_config

    prepared = check(load_config(config))
    document = {
        "models": [
            {"name": each.config.name, **plan_document(each.plan, each.inputs)} for each in prepared
        ]
    }
    emit(document, [each.line() for each in prepared], as_json=as_json)


@commands.command("serve")
def serve_command(config: Config, as_json: AsJson = False) -> None:
    """Serve a configuration on this machine until Ctrl-C; SIGUSR1 takes its live policy anew."""
    from deployments.cli.serve import serve_config
    from select_n_core.config import load_config

    serve_config(load_config(config), read_again=lambda: load_config(config), as_json=as_json)


@commands.command("status")
def status_command(
    url: Annotated[str, typer.Option(help="Of an ingress.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SELECT_N_API_KEY", help="Of a tenant, where there are tenants."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show nodes, replicas, N, leases and latencies until Ctrl-C; once if not on a terminal."""
    from deployments.cli.status import fetch, watch

    if as_json:
        emit(fetch(url, api_key), [], as_json=True)
    else:
        watch(url, api_key)


@commands.command("audit")
def audit_command(as_json: AsJson = False) -> None:
    """Compare the host memory reserved on this machine with what the kernel maps; exit code 1
    where they differ."""
    from deployments.cli.audit import audit_lines, audit_machine

    document = audit_machine()
    emit(document, audit_lines(document), as_json=as_json)
    if not document["agrees"]:
        raise SystemExit(FAILED)


@commands.command("generate")
def generate_command(
    source: Source,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Output tokens at most.")] = 64,
    interval: Annotated[str, typer.Option(help="auto, off or N: one in every N units.")] = "auto",
    tpot: Annotated[
        float,
        typer.Option(parser=options.positive_seconds, metavar="TIME", help="Target for auto."),
    ] = "100ms",  # type: ignore[assignment]
    device_memory: Annotated[
        int | None,
        typer.Option(
            parser=options.positive_bytes,
            metavar="SIZE",
            help="Device arena; default: what the interval needs.",
        ),
    ] = None,
    link: LinkOption = "emulated:1GB/s",
    dtype: DTypeOption = "bfloat16",
    units: UnitsOption = "layer",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    as_json: AsJson = False,
) -> None:
    """Complete a prompt in this process and say what the streaming did."""
    from deployments.cli.generate import generate
    from select_n_core.engine.messages import SamplingParams

    config = options.model_config(
        name="generate",
        source=source,
        dtype=dtype,
        device_memory=device_memory or 1,
        host_memory=1 << 50,  # one process: the machine's own memory is the limit
        link=link,
        slo={"tpot": tpot, "ttft": 3600.0},
        interval=interval,
        units=units,
        max_batch=1,
        workload={"prompt_tokens": 32, "output_tokens": 32},
    )
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    result = generate(config, prompt, sampling, sized=device_memory is not None)
    emit(result, [result["text"], "", result["plan"]], as_json=as_json)


@commands.command("key")
def key_command(
    tenant: Annotated[str, typer.Argument(help="Whose it is to be, as the configuration has it.")],
    as_json: AsJson = False,
) -> None:
    """Make an API key: the key for the tenant, and the line with its hash for the keys_file."""
    from deployments.cli.keys import make_key

    made = make_key(tenant)
    emit(made, [made["key"], made["line"]], as_json=as_json)


@commands.command("render-k8s")
def render_command(
    config: Config,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write into.")],
    image: Annotated[str, typer.Option(help="Container image with this project.")] = (
        "select-n:latest"
    ),
    namespace: Annotated[str, typer.Option(help="Kubernetes namespace.")] = "select-n",
    name: Annotated[str, typer.Option(help="Of the RayService.")] = "select-n",
    cpus: Annotated[int, typer.Option(help="Cores of one worker pod.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Write a KubeRay RayService and kustomization for a configuration."""
    from deployments.cli.render import RenderOptions, render, write
    from select_n_core.config import load_config

    files = render(load_config(config), RenderOptions(image, namespace, name, cpus))
    write(files, output)
    paths = [str(output / file) for file in files]
    emit({"files": paths}, paths, as_json=as_json)


def app() -> None:
    """The entry point: libraries stay offline and quiet unless the user says otherwise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    run(commands)


if __name__ == "__main__":
    app()
