"""Sections of settings that methods register."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator

import pytest
from pydantic import Field, model_validator

from mat_dist import train
from mat_dist.config import config_differences, dump_config, load_config, schema_json
from mat_dist.config import methods as registry
from mat_dist.config.fields import Number, Section
from mat_dist.config.help import settings_help
from mat_dist.config.methods import Method, register_method
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError


class Shake(Section):
    """Settings of a method that there is not."""

    gamma: Number = Field(0.5, gt=0, le=1, description="how much it shakes")
    often: bool = Field(False, description="shake in every step")


def register_section(name: str, section: type[Section], says: str) -> None:
    register_method(Method(name, says, section=section))


@pytest.fixture(autouse=True)
def shake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_METHODS", {"presets": registry.methods()["presets"]})  # mat, the default, and at
    register_section("shake", Shake, "a method that shakes")
    yield


def test_a_registered_section_holds_for_all_peers_and_each_may_say_otherwise(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("methods:\n  shake:\n    gamma: 1/4\npeers:\n- methods:\n    shake: {often: true}\n- {}\n-\n")
    config = load_config(str(file), ["peers.1.methods.shake.gamma=0.75"])
    assert [peer.methods for peer in config.peers] == [
        {"shake": Shake(gamma=0.25, often=True)}, {"shake": Shake(gamma=0.75)}, {"shake": Shake(gamma=0.25)}]
    assert config.methods == {} and pickle.loads(pickle.dumps(config)) == config


def test_it_survives_a_dump(tmp_path):
    config = load_config("digits", ["peers.1.methods.shake.gamma=0.1"])
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "dumped.yaml")) == config
    assert config.model_dump(mode="json")["peers"][1]["methods"] == {"shake": {"gamma": 0.1, "often": False}}
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert config_differences(load_config("digits"), config)[0] == "peers.1.methods.shake.gamma: null -> 0.1"


@pytest.mark.parametrize("item", ["methods=null", "methods.shake=null", "methods={}", "methods={shake: null}"])
def test_an_empty_section_is_absent(item):
    assert all(peer.methods == {} for peer in load_config("digits", [item]).peers)


def test_a_peer_may_do_without_the_method_of_the_others(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("methods: {shake: {gamma: 1/4}}\npeers: [{}, {methods: {shake: null}}, {}]\n")
    config = load_config(str(file), ["peers.2.methods.shake=null"])
    assert [sorted(peer.methods) for peer in config.peers] == [["shake"], [], []]
    (tmp_path / "b.yaml").write_text("defaults: [a.yaml]\nmethods: {shake: null}\n")
    assert not any(peer.methods for peer in load_config(str(tmp_path / "b.yaml")).peers)


def test_a_section_without_settings_is_there_with_its_defaults():
    assert load_config("digits", ["methods.shake={}"]).peers[2].methods == {"shake": Shake()}


@pytest.mark.parametrize("item,what,how", [
    ("methods.shaek.gamma=1", "there is no setting methods.shaek", "did you mean methods.shake.gamma?"),
    ("methods.other={}", "there is no setting methods.other", "known here: shake"),
    ("peers.0.methods.other.x=1", "there is no setting peers.0.methods.other", "known here: shake"),
    ("peers.2.methods.shake.gama=1", "there is no setting peers.2.methods.shake.gama", "methods.shake.gamma?"),
    ("peers.2.methods.shake.gamma=-1", "-1 cannot be used for peers.2.methods.shake.gamma", "> 0"),
    ("methods.shake=3", "3 cannot be used for the section methods.shake", "gamma, often"),
    ("methods=3", "3 cannot be used for the section methods", "below it: shake"),
])
def test_what_is_wrong_is_told_with_key_and_way_out(item, what, how):
    with pytest.raises(ConfigError) as caught:
        load_config("digits", [item])
    assert caught.value.problems[0].what.startswith(what) and how in str(caught.value.problems[0])


class Strict(Section):
    """Settings of which one must be given, and two belong together."""

    size: Number = Field(description="how much")
    shape: str = Field("round", description="which")

    @model_validator(mode="after")
    def _fits(self) -> Strict:
        if self.size > 1 and self.shape == "flat":
            raise ValueError("nothing flat is larger than 1")
        return self


@pytest.mark.parametrize("item,what", [
    ("methods.strict={}", "peers.0.methods.strict.size is not given"),
    ("peers.1.methods.strict.shape=flat", "peers.1.methods.strict.size is not given"),
    ("peers.1.methods.strict={shape: flat, size: 2}", "peers.1.methods.strict cannot be used: nothing flat is larger"),
])
def test_a_section_may_ask_for_settings_and_refuse_what_does_not_fit(item, what):
    register_section("strict", Strict, "a method with demands")
    with pytest.raises(ConfigError) as caught:
        load_config("digits", [item])
    assert caught.value.problems[0].what.startswith(what.replace("peers.0.", "")) or what in str(caught.value)
    assert "command line" in caught.value.problems[0].where


def test_help_and_json_schema_list_it_as_soon_as_it_is_registered():
    text = " ".join(settings_help().split())
    assert "methods.shake.gamma=0.5 how much it shakes [number > 0, <= 1]" in text and "methods.shake.often=" in text
    schema = json.loads(schema_json())
    for properties in (schema["properties"], schema["$defs"]["PeerConfig"]["properties"]):
        section, empty = properties["methods"]["anyOf"]
        assert empty == {"type": "null"} and not section["additionalProperties"]
        assert section["properties"]["shake"]["anyOf"] == [{"$ref": "#/$defs/Shake"}, {"type": "null"}]


def test_a_name_is_one_word_and_registered_once():
    register_section("shake", Shake, "again: a plug-in may be loaded twice")
    with pytest.raises(ConfigError, match="registered twice"):
        register_section("shake", type("Other", (Section,), {}), "another one")
    for section in (None, Shake):  # one that is there has no section to be told from another by
        with pytest.raises(ConfigError, match="registered twice"):
            register_method(Method("presets", "another one", section=section))
        assert "mat" in registry.presets()
    with pytest.raises(ConfigError, match="cannot name a method"):
        register_section("sh.ake", Shake, "a dot")


def test_a_method_cannot_replace_a_preset_or_strategy_of_another_one():
    mat = registry.presets()["mat"]
    with pytest.raises(ConfigError, match="mat is already among the presets of the method presets"):
        register_method(Method("mine", "takes a name", presets={"mat": registry.Preset()}))
    register_method(Method("first", "has a strategy", strategies={"worst": registry.Strategy("the worst")}))
    with pytest.raises(ConfigError, match="worst is already among the strategies of the method first"):
        register_method(Method("second", "wants it", strategies={"worst": registry.Strategy("another")}))
    assert registry.presets()["mat"] is mat and "second" not in registry.methods()


def test_a_preset_is_there_while_its_strategy_is_and_fills_in_what_is_not_said():
    register_method(Method("lone", "needs a strategy", presets={"lone": registry.Preset(strategy="worst")}))
    assert "lone" not in registry.presets()
    register_method(Method("first", "has it", strategies={"worst": registry.Strategy("the worst"),
                                                          "other": registry.Strategy("another")}))
    found = load_config("digits", ["peers=4", "loss=lone", "peers.1.union.strategy=other", "peers.2.role=specialist",
                                   "peers.3.union.strategy=null"]).peers
    assert [peer.union.strategy for peer in found] == ["worst", "other", None, None]


def test_a_plug_in_is_imported_before_the_settings_are_read(tmp_path, capsys):
    plugin = tmp_path / "wobble.py"
    plugin.write_text("from pydantic import Field\nfrom mat_dist.config.methods import Method, register_method\n"
                      "from mat_dist.config.fields import Number, Section\n\n\nclass Wobble(Section):\n"
                      "    by: Number = Field(1, description='how far')\n\n\n"
                      "register_method(Method('wobble', 'wobbles', section=Wobble))\n")
    words = ["--plugin", str(plugin), "peers.1.methods.wobble.by=1/4", "run.device=cpu", "--dry-run"]
    assert train.main(words) == 0
    assert "    wobble:\n      by: 0.25\n" in capsys.readouterr().out
    assert train.main(words[2:]) == 0  # it stays registered in this process


@pytest.mark.parametrize("words", [["--help", "--plugin"], ["x=1", "-h", "--plugin"]])
def test_the_help_has_the_settings_of_a_plug_in(tmp_path, capsys, words):
    plugin = tmp_path / "wave.py"
    plugin.write_text("from pydantic import Field\nfrom mat_dist.config.methods import Method, register_method\n"
                      "from mat_dist.config.fields import Number, Section\n\n\nclass Wave(Section):\n"
                      f"    height: Number = Field({len(words)}, description='how high')\n\n\n"
                      "register_method(Method('wave', 'waves', section=Wave))\n")
    with pytest.raises(SystemExit, match="0"):
        train.main([*words, str(plugin)])
    assert f"methods.wave.height={len(words)}" in capsys.readouterr().out
