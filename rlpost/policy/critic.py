"""The critic: value heads on the policy's hidden states, or on a model of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlpost.errors import RecipeError
from rlpost.experience import TokenRows
from rlpost.gradient.gae import first_tokens, last_tokens
from rlpost.policy.attention import mask_for
from rlpost.recipe.sections.base import unknown_choice
from rlpost.recipe.sections.critic import CriticSection
from rlpost.recipe.sections.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueHead(nn.Module):
    """LayerNorm, then one or two small networks from a hidden state [M, d] to a value each: [M, H], at least float32.

    Deterministic in `seed`. The last layers start at standard deviation 1 / sqrt(inputs + 1) (arXiv 2403.17031).
    """

    def __init__(self, width: int, critic: CriticSection, *, seed: int = 0) -> None:
        super().__init__()
        inner = round(critic.hidden_share * width)
        self.norm = nn.LayerNorm(width) if critic.layer_norm else nn.Identity()
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the run's generator
            self.heads = nn.ModuleList(_head(width, inner) for _ in range(critic.heads))
        generator = torch.Generator().manual_seed(seed)
        for head in self.heads:
            layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
            for layer in layers:
                nn.init.normal_(layer.weight, std=(layer.in_features + 1) ** -0.5, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Computed in the weights' own precision, also under autocast: bfloat16 values would have three digits."""
        with torch.autocast(hidden.device.type, enabled=False):
            normed = self.norm(hidden.to(next(self.parameters()).dtype))
            values = torch.cat([head(normed) for head in self.heads], dim=-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))


class Critic(nn.Module):
    """Reads the values of a micro-batch's completions, from the policy's hidden states or from its own model's.

    Meant to be a submodule of the policy, so that whatever shards or wraps the policy does the same to it.
    """

    def __init__(self, critic: CriticSection, head: ValueHead, trunk: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.settings = critic
        self.head = head
        self.trunk = trunk

    def forward(self, rows: TokenRows, picked: Tensor) -> Tensor:
        """Values [M, H]: before every completion token of `rows` (M = N), or one a completion, at the prompt's end (`level:
        sequence`) or before its last token (`level: answer`; M = completions in `rows`, in their order).

        `picked` [N, d] are the policy's hidden states that predict the tokens; a separate critic ignores them.
        """
        if self.trunk is not None:
            hidden = self.trunk(
                input_ids=rows.input_ids,
                position_ids=rows.position_ids,
                attention_mask=mask_for(self.trunk, rows),
                use_cache=False,
            ).last_hidden_state
            picked = states_at(hidden, rows)
        else:
            picked = scale_gradient(picked, self.settings.trunk_gradient)
        places = read_places(self.settings, rows.sequence)
        return self.head(picked if places is None else functional.embedding(places, picked))


def states_at(hidden: Tensor, rows: TokenRows) -> Tensor:
    """[N, d] the hidden states [R, T, d] that predict the tokens of `rows`."""
    place = rows.predict_row * rows.input_ids.shape[1] + rows.predict_col
    # A look-up and not hidden[row, col]: several branches read the prompt's last state, and the backward of an indexing
    # adds up such repeats in an order that changes with the threads.
    return functional.embedding(place, hidden.flatten(0, 1))


def read_places(critic: CriticSection, sequence: Tensor) -> Tensor | None:
    """Which of a view's N tokens [M] a value is read before; None: all of them."""
    match critic.level:
        case "token":
            return None
        case "sequence":
            return first_tokens(sequence)
        case "answer":
            return last_tokens(sequence)
        case _:
            raise unknown_choice("critic.level", critic.level)


def scale_gradient(tensor: Tensor, share: float) -> Tensor:
    """The same numbers, with `share` of the gradient."""
    if share == 1:
        return tensor
    fixed = tensor.detach()
    return fixed if share == 0 else fixed + share * (tensor - fixed)


def make_critic(
    critic: CriticSection,
    model: ModelSection,
    path: str,
    width: int,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    longest: int | None = None,
) -> Critic:
    """A critic for a policy of hidden size `width`; a separate one starts from the model at `path`, and reads sequences of
    `longest` tokens at the most (None: not known).

    Raises RecipeError naming `method.critic.path` where that model is missing or incomplete.
    """
    match critic.model:
        case "trunk":
            return Critic(critic, ValueHead(width, critic, seed=seed)).to(device)
        case "separate":
            trunk = _load_trunk(model, path, device, longest)
            head = ValueHead(trunk.config.get_text_config().hidden_size, critic, seed=seed)
            return Critic(critic, head, trunk).to(device)
        case _:
            raise unknown_choice("critic.model", critic.model)


def _load_trunk(model: ModelSection, path: str, device: torch.device | str, longest: int | None) -> PreTrainedModel:
    """The model without its output layer, ready to be trained. No dropout, as for the policy."""
    from transformers import AutoModel

    from rlpost.policy.loading import load_config, ready_to_train, without_progress_bars
    from rlpost.policy.rotary import fix_frequencies

    config, _notes = load_config(model, path, device=device, longest=longest, key="method.critic.path")
    try:
        with without_progress_bars():
            trunk, report = AutoModel.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, model.dtype),
                attn_implementation=config._attn_implementation,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of all kinds, as for the policy
        raise RecipeError(
            f"method.critic.path: cannot load a model from {path} ({type(error).__name__}: {error}); give a folder in "
            "Hugging Face layout, a model name that this machine can download, or null for the policy's own"
        ) from error
    if report["missing_keys"]:
        raise RecipeError(
            f"method.critic.path: the model at {path} lacks weights ({', '.join(sorted(report['missing_keys'])[:3])}, ...), "
            "which would be made up at random; give a complete model"
        )
    fix_frequencies(trunk, longest)
    return ready_to_train(trunk, gradient_checkpointing=model.gradient_checkpointing)


def _head(width: int, inner: int) -> nn.Sequential:
    if inner == 0:
        return nn.Sequential(nn.Linear(width, 1))
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, 1))
