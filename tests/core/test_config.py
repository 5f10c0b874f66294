"""The configuration file: the quickstart loads; what is broken is one line naming the field."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import yaml

from select_n_core.config import BUILDER, ModelConfig, load_config, parse_args, parse_config
from select_n_core.errors import ConfigError, InputError
from select_n_core.slo import SLO

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
DOCUMENT = yaml.safe_load(QUICKSTART.read_text())
MODEL = "applications.0.args.models.0"
ABSENT = object()


def document(**fields: object) -> dict:
    """The quickstart with fields of its model changed."""
    changed = copy.deepcopy(DOCUMENT)
    model = changed["applications"][0]["args"]["models"][0]
    for name, value in fields.items():
        if value is ABSENT:
            del model[name]
        else:
            model[name] = value
    return changed


def model(**fields: object) -> ModelConfig:
    return parse_config(document(**fields)).serve.models[0]


def refusal(broken: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(broken)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    return caught.value


class TestQuickstart:
    def test_it_loads(self):
        config = load_config(QUICKSTART)
        only = config.serve.models[0]
        assert only.source == "demo:smollm2-135m-instruct"
        assert only.device_memory == 256 << 20
        assert only.link.kind == "emulated"
        assert only.link.bandwidth == 1e9
        assert only.slo.targets() == SLO(tpot_s=0.1, ttft_s=2.0)
        assert (only.interval, only.slots, only.engine) == ("auto", 2, "process")
        assert (config.http.host, config.http.port) == ("127.0.0.1", 8000)

    def test_what_is_rays_passes_through_untouched(self):
        raw = document()
        raw["logging_config"] = {"log_level": "INFO"}
        raw["http_options"]["request_timeout_s"] = 5
        raw["applications"].append({"name": "other", "import_path": "other:app"})
        config = parse_config(raw)
        assert config.document["logging_config"] == {"log_level": "INFO"}
        assert config.document["http_options"]["request_timeout_s"] == 5
        assert config.document["applications"] == raw["applications"]

    def test_without_http_options_it_listens_on_loopback_only(self):
        raw = document()
        del raw["http_options"], raw["proxy_location"]
        assert parse_config(raw).document["http_options"] == {"host": "127.0.0.1", "port": 8000}

    def test_a_model_travels_between_processes(self):
        assert pickle.loads(pickle.dumps(model())) == model()


class TestSLO:
    def test_one_waits_until_its_first_token_is_due_unless_said_otherwise(self):
        assert model().slo.targets().max_wait_s is None
        assert model().slo.targets().longest_wait_s == 2.0
        patient = model(slo={"tpot": "100ms", "ttft": "2s", "max_wait": "500ms"}).slo.targets()
        assert patient == SLO(tpot_s=0.1, ttft_s=2.0, max_wait_s=0.5)
        assert patient.longest_wait_s == 0.5

    def test_one_may_not_have_to_wait_at_all(self):
        assert model(slo={"tpot": "100ms", "max_wait": 0}).slo.targets().longest_wait_s == 0

    def test_nobody_waits_for_a_first_token_that_is_late(self):
        error = refusal(document(slo={"tpot": "100ms", "ttft": "2s", "max_wait": "3s"}))
        assert error.field == f"{MODEL}.slo"
        assert "max_wait (3 s) is above ttft (2 s)" in str(error)
        with pytest.raises(InputError, match="max_wait_s must be between 0 and ttft_s") as caught:
            SLO(tpot_s=0.1, ttft_s=2.0, max_wait_s=3.0)
        assert caught.value.field == "max_wait_s"


class TestPolicy:
    @pytest.mark.parametrize("written", ["select_n", "fetch_all", "resident", "static:2.5"])
    def test_what_it_may_be(self, written):
        assert model(policy=written).policy == written

    def test_ours_is_the_one_unless_said_otherwise(self):
        assert model().policy == "select_n"

    def test_flexgen_is_fitted_to_a_load(self):
        assert model(policy="flexgen", workload={"rate": 2}).policy == "flexgen"

    def test_compute_is_real_unless_a_record_paces_it(self):
        assert model().compute is None
        assert model(compute=PACED).compute.record == "record.json"


class TestInterval:
    @pytest.mark.parametrize(
        ("written", "read"),
        [("auto", "auto"), ("off", "off"), (False, "off"), (3, 3.0), (2.5, 2.5), ("7", 7.0)],
    )
    def test_what_it_may_be(self, written, read):
        assert model(interval=written).interval == read

    def test_a_bare_off_in_yaml_is_off(self):
        assert model(interval=yaml.safe_load("off")).interval == "off"

    @pytest.mark.parametrize("broken", [0.5, 0, -3, "x", True, None, [2], math.nan, math.inf])
    def test_what_it_may_not_be(self, broken):
        error = refusal(document(interval=broken))
        assert error.field == f"{MODEL}.interval"
        assert str(error) == (
            f"{MODEL}.interval: must be auto, off or a number N of 1 or more "
            f"(one in every N layers is streamed), got {broken!r}"
        )


EMULATED, CUDA = {"kind": "emulated"}, {"kind": "cuda"}
PACED = {"kind": "paced", "record": "record.json"}


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"device_memory": "256 apples"}, "device_memory", "'256 apples' is not a byte quantity"),
        ({"device_memory": "100ms"}, "device_memory", "write it with a unit, for example '256MiB'"),
        ({"device_memory": "256"}, "device_memory", "write it with a unit, for example '256MiB'"),
        ({"device_memory": -1}, "device_memory", "greater than 0, got -1"),
        ({"device_memory": ABSENT}, "device_memory", "Field required"),
        ({"host_memory": "-1GiB"}, "host_memory", "greater than or equal to 0, got '-1GiB'"),
        ({"host_memory": math.inf}, "host_memory", "inf is not a byte quantity"),
        ({"slo": {"tpot": "0ms"}}, "slo.tpot", "greater than 0, got '0ms'"),
        ({"slo": {"tpot": "256MiB"}}, "slo.tpot", "is not a second quantity"),
        ({"slo": {"ttft": "1s"}}, "slo.tpot", "Field required"),
        ({"slo": "100ms"}, "slo", "needs its fields, as a mapping, got '100ms'"),
        ({"link": {"kind": "pcie"}}, "link.kind", "'emulated' or 'cuda', got 'pcie'"),
        ({"link": EMULATED}, "link", "an emulated link needs `bandwidth`, for example 1GB/s"),
        ({"link": EMULATED | {"bandwidth": "1GB"}}, "link.bandwidth", "for example '2GB/s'"),
        ({"link": EMULATED | {"bandwidth": 0}}, "link.bandwidth", "greater than 0, got 0"),
        ({"link": CUDA | {"bandwidth": "1GB/s"}}, "link", "is measured; remove `bandwidth`"),
        ({"link": CUDA | {"latency": "1ms"}}, "link", "is measured; remove `bandwidth`"),
        ({"colour": "red"}, "colour", "unknown field; remove it or check its spelling"),
        ({"link": CUDA | {"speed": 1}}, "link.speed", "unknown field"),
        ({"dtype": "int8"}, "dtype", "'bfloat16', 'float16' or 'float32', got 'int8'"),
        ({"name": ""}, "name", "at least 1 character"),
        ({"name": "two words"}, "name", "got 'two words'"),
        ({"source": ABSENT}, "source", "Field required"),
        ({"slots": 0}, "slots", "greater than or equal to 1, got 0"),
        ({"slots": 2.5}, "slots", "got 2.5"),
        ({"block_tokens": 17}, "block_tokens", "got 17"),
        ({"prefix_caching": "perhaps"}, "prefix_caching", "got 'perhaps'"),
        ({"max_batch": "many"}, "max_batch", "got 'many'"),
        ({"max_batch": 32, "max_step_tokens": 16}, "", "max_step_tokens (16) is below max_batch"),
        ({"engine": "thread"}, "engine", "'process' or 'inline', got 'thread'"),
        ({"replicas": {"min": 3, "max": 1}}, "replicas", "min (3) is above max (1)"),
        ({"workload": {"rate": 0}}, "workload.rate", "greater than 0, got 0"),
        ({"workload": {"rate": math.inf}}, "workload.rate", "finite number"),
        ({"policy": "zero"}, "policy", "flexgen, resident or static:N with a number N of 1"),
        ({"policy": "static:0.5"}, "policy", "got 'static:0.5'"),
        ({"policy": None}, "policy", "got 'None'"),
        ({"policy": "resident", "interval": 2}, "interval", "policy resident decides it"),
        ({"policy": "flexgen"}, "", "set workload.rate (requests per second)"),
        ({"compute": {"kind": "paced"}}, "compute.record", "Field required"),
        ({"compute": PACED | {"kind": "fast"}}, "compute.kind", "'paced', got 'fast'"),
        ({"compute": PACED | {"speed": 2}}, "compute.speed", "unknown field"),
        ({"compute": PACED, "link": CUDA}, "", "compute.kind paced needs an emulated link"),
    ],
)
def test_a_broken_field_of_a_model_is_named(fields, field, says):
    error = refusal(document(**fields))
    assert error.field == f"{MODEL}.{field}".rstrip(".")
    assert str(error).startswith(f"{error.field}: ")
    assert says in str(error)


def test_further_problems_are_counted():
    error = refusal(document(slots=0, dtype="int8", colour="red"))
    assert str(error).endswith("(and 2 more)")


def test_two_models_of_one_name_are_refused():
    raw = document()
    raw["applications"][0]["args"]["models"] *= 2
    assert "model names must differ" in str(refusal(raw))


@pytest.mark.parametrize("args", [None, {}, {"models": []}, {"models": ["demo"]}, [1]])
def test_args_without_models_are_refused_naming_where(args):
    raw = document()
    raw["applications"][0]["args"] = args
    assert refusal(raw).field.startswith("applications.0.args")


def test_args_alone_are_refused_naming_them_args():
    with pytest.raises(ConfigError, match=r"^args\.models: "):
        parse_args({"models": []})


@pytest.mark.parametrize("broken", [None, [], "text", {}, {"applications": {}}])
def test_a_file_without_applications_is_refused(broken):
    assert str(refusal(broken)) == "the file needs a list `applications`"


@pytest.mark.parametrize("count", [0, 2])
def test_there_is_one_application_serve(count):
    raw = {"applications": [*([DOCUMENT["applications"][0]] * count), {"name": "other"}]}
    assert str(refusal(raw)) == (
        f"applications needs exactly one entry named 'serve', found {count}"
    )


def test_the_application_is_built_by_us():
    raw = document()
    raw["applications"][0]["import_path"] = "other:app"
    error = refusal(raw)
    assert error.field == "applications.0.import_path"
    assert BUILDER in str(error)


@pytest.mark.parametrize(("port", "says"), [(0, "got 0"), (70000, "got 70000"), ("x", "got 'x'")])
def test_an_impossible_port_is_named(port, says):
    error = refusal(document() | {"http_options": {"port": port}})
    assert error.field == "http_options.port"
    assert says in str(error)


class TestFile:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "the file needs a list `applications`"),
            (b"a: [1, 2", "is not valid YAML: "),
            (b"\xff\xfe", "is not valid YAML: it is not UTF-8"),
        ],
    )
    def test_what_is_no_configuration_is_refused_in_one_line(self, tmp_path, content, says):
        path = tmp_path / "broken.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml: No such file"):
            load_config(tmp_path / "missing.yaml")

    def test_a_directory_is_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match="Is a directory"):
            load_config(tmp_path)
