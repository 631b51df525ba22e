"""Packs: completions that share a prompt read it once, see nothing of each other, and cost less or are not packed."""

import pytest
import torch
from test_rollout import make_model
from test_trainer import assert_same_gradients, no_flat, tokens, train
from trl import GRPOTrainer

from engine import packing
from engine.packing import Row, arrange, lay_out, pair_cost, plan, read_rows, why_not
from engine.trainer import LeanGRPOTrainer

LONG = {"prompt_words": 40}  # far longer than the completions, so that sharing pays


def rows_of(*groups: tuple[int, list[int]]) -> list[Row]:
    """Rows of groups, each a prompt's length and the lengths of its completions."""
    pairs = [(number, prompt, length) for number, (prompt, lengths) in enumerate(groups) for length in lengths]
    return [Row(index, *pair) for index, pair in enumerate(pairs)]


# ------------------------------------------------------------------------------------------------------ the plan
def test_short_answers_share_and_long_ones_do_not():
    """A long prompt before short answers is read once; behind a short one, long answers stay by themselves."""
    short, long = rows_of((200, [40] * 8)), rows_of((20, [500] * 8))
    assert [len(pack) for pack in plan(short, pair_cost=1e-4)[0]] == [8]
    assert [len(pack) for pack in plan(long, pair_cost=1e-3)[0]] == [1] * 8


@pytest.mark.parametrize("cost", [0.0, 1e-4, 1e-3, 1e-2])
def test_never_more_than_without(cost):
    """Whatever the lengths are, what is planned costs at most what rows by themselves cost, and holds each row once."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        numbers = torch.randint(1, 400, (4, 10), generator=draw).tolist()
        rows = rows_of(*((prompt + 1, lengths[: 1 + prompt % 9]) for prompt, *lengths in numbers))
        packs, planned = plan(rows, cost)
        alone, without = plan(rows, cost, shared=False)
        assert planned <= without and {len(pack) for pack in alone} == {1}
        assert sorted(row for pack in packs for row in pack) == sorted(rows)
        assert all(len({row.prompt for row in pack}) == 1 for pack in packs)


def test_the_longest_come_first_and_groups_stay_together():
    """Where sharing pays, a micro batch holds whole groups; where it does not, rows of like length."""
    rows = rows_of((100, [10, 90]), (100, [50, 40]), (100, [20, 30]))
    shared = arrange(rows, micro_batch=2, pair_cost=0.0, shared=True)
    assert [row.prompt for row in shared] == [0, 0, 1, 1, 2, 2]
    alone = arrange(rows, micro_batch=2, pair_cost=0.0, shared=False)
    assert [row.length for row in alone] == [90, 50, 40, 30, 20, 10]


def test_pair_cost_of_the_recipes_model():
    """24 layers of 14 heads of 64 over 358 million weights: at 1,000 tokens attention adds an eighth."""
    from qwen import SHAPE
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    assert pair_cost(model) == pytest.approx(8 * 1.2e-4, rel=0.02)


# ---------------------------------------------------------------------------------------------------- the layout
def test_layout():
    """Two prompts, three completions: ids, labels, positions, who sees whom, and where the results go."""
    ids = torch.tensor([[0, 7, 8, 21, 22, 0], [0, 7, 8, 31, 0, 0], [4, 5, 6, 41, 42, 43]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    rows = read_rows(ids, mask, 3)
    assert rows[0].prompt == rows[1].prompt != rows[2].prompt
    assert [(row.prompt_length, row.length) for row in rows] == [(2, 2), (2, 1), (3, 3)]
    layout = lay_out([[rows[2]], [rows[0], rows[1]]], ids, 3)
    assert layout.ids.tolist()[0] == [4, 5, 6, 41, 42] and layout.ids.tolist()[1][:4] == [7, 8, 21, 8]
    assert layout.labels.tolist() == [[-100, -100, 41, 42, 43], [-100, 21, 22, 31, -100]]
    assert layout.positions.tolist()[0] == [0, 1, 2, 3, 4] and layout.positions.tolist()[1][:4] == [0, 1, 2, 1]
    assert layout.mask[1, 0, :4, :4].tolist() == [
        [True, False, False, False],  # the prompt
        [True, True, False, False],  # the last token of the prompt, before the first completion
        [True, True, True, False],
        [True, False, False, True],  # the same token before the second completion, which does not see the first
    ]
    assert layout.places.tolist() == [2, 3, 4, 6, 7, 8]
    assert layout.targets.tolist() == [[2, 2, 2, 0, 0, 1], [0, 1, 2, 0, 1, 0]]


def test_prompts_that_differ_in_padding_only():
    """Equal tokens are one prompt only where they are read: a pad that is masked is no token of the prompt."""
    ids = torch.tensor([[5, 7, 9], [6, 7, 9], [5, 7, 9]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1]])
    first, second, third = read_rows(ids, mask, 2)
    assert first.prompt == second.prompt != third.prompt


# ------------------------------------------------------------------------------------------------- the gradients
class Packed(LeanGRPOTrainer):
    """Packs as much as it can, whatever attention costs."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        assert self.shares_prompts
        self.pair_cost = 0.0


CASES = {
    "dapo": {},
    "micro batches of whole groups": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "a group in two micro batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
    "one micro batch": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo, KL": {"loss_type": "dr_grpo", "beta": 0.1},
    "bnpo": {"loss_type": "bnpo", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "entropy bonus": {"entropy_coef": 0.1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "LoRA": {"lora": True},
    "LoRA, KL": {"lora": True, "beta": 0.1},
    "LoRA, checkpointing": {"lora": True, "activation_checkpointing": True},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "cut-off ones masked": {"mask_truncated_completions": True, "max_completion_length": 12},
    "completions of a token": {"max_completion_length": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_stock(tmp_path, case):
    """With packs as large as can be the gradient of every parameter in every step is TRL's."""
    stock, ours = (train(kind, tmp_path, **LONG | CASES[case]) for kind in (GRPOTrainer, Packed))
    assert_same_gradients(ours, stock)
    tied = not ours._rows_are_independent()  # such rows keep TRL's order, and share where they happen to meet
    assert (1 if tied else 2) * tokens(ours) < tokens(stock)
    assert any(packs < rows for (packs, _), (rows, _) in zip(ours.computed, stock.computed, strict=False))


WRONG = {  # what is done -> the function of packing.py that it changes, to what
    "a completion sees its neighbour": ("lay_out", lambda layout: layout._replace(mask=causal(layout.mask))),
    "positions do not restart": ("lay_out", lambda layout: layout._replace(positions=counted(layout.positions))),
    "different questions share a prompt": ("read_rows", lambda rows: [row._replace(prompt=0) for row in rows]),
    "a completion is scored as another": ("lay_out", lambda layout: layout._replace(places=layout.places.flip(0))),
}


def causal(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else torch.ones_like(mask).tril()


def counted(positions: torch.Tensor | None) -> torch.Tensor | None:
    return None if positions is None else torch.arange(positions.shape[1]).expand_as(positions)


@pytest.mark.parametrize("what", WRONG)
def test_comparison_notices(tmp_path, monkeypatch, what):
    """Negative controls: wherever packing would be wrong, the comparison with TRL fails."""
    settings = LONG | {"reward": no_flat, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    stock = train(GRPOTrainer, tmp_path, **settings)
    name, change = WRONG[what]
    right = getattr(packing, name)
    monkeypatch.setattr(packing, name, lambda *args: change(right(*args)))
    with pytest.raises(AssertionError):
        assert_same_gradients(train(Packed, tmp_path, **settings), stock)


# ------------------------------------------------------------------------------------------ what it does not cover
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma"}, "not tried with a gemma model"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"_attn_implementation": "eager"}, "eager attention takes no mask"),
        ({"output_router_logits": True}, "routers"),
    ],
)
def test_why_not(change, words):
    """An architecture that the packs were not tried with is named."""
    model = make_model()
    assert why_not(model) is None
    for name, value in change.items():
        setattr(model.config, name, value)
    assert words in why_not(model)


def test_without_sharing_a_note_says_why(tmp_path, monkeypatch, capsys):
    """Where packs are not covered, rows are trained by themselves, with TRL's gradients, and one note says why."""
    monkeypatch.setattr(packing, "why_not", lambda model: "not tried with this")
    stock, ours = (train(kind, tmp_path, **LONG) for kind in (GRPOTrainer, LeanGRPOTrainer))
    assert_same_gradients(ours, stock)
    assert capsys.readouterr().out.count("reads its prompt by itself, slower: not tried with this") == 1
