"""`CometModel` with a language-model head: what Hugging Face calls a causal language model.

Pitfalls:
    - With `past_key_values` the first token of a call is not a label: its logits were the last
      call's.
    - Loss without `logits_to_keep` returns no logits: it holds those of one chunk at a time. What
      looks at them, as a Trainer's `compute_metrics`, needs `config.logits_with_labels`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from cometlm.backbones.logits import final_logits
from cometlm.backbones.taking_apart import take_apart
from cometlm.checkpoints.fingerprint import sample
from cometlm.checkpoints.mixin import CheckpointMixin
from cometlm.compat import CACHE, EitherName, takes_either_name
from cometlm.config import CometModelConfig, position_field, position_limit
from cometlm.core.attachment import AttachmentMixin, Undo
from cometlm.core.attention import NAME
from cometlm.core.cache import CometCache
from cometlm.core.fixed_cache import FixedCache
from cometlm.core.generation import MemoryGenerationMixin
from cometlm.core.model import CometModel
from cometlm.core.observer import Score
from cometlm.core.packed_products import PackedProducts
from cometlm.core.plan import Budget, Scored
from cometlm.core.pretrained_model import CometPreTrainedModel
from cometlm.core.text_batch import check_labels, check_shape, next_labels
from cometlm.core.training_plan import TrainingPlan
from cometlm.device import sent

_SAID_BY_GENERATE = {"position_ids"}  # with each token, and they say nothing new


@dataclass
class CometCausalOutput(EitherName, CausalLMOutputWithPast):
    """transformers' output, and what labels add.

    Attributes:
        num_correct: how many labels were the likeliest token (a scalar).
        observed: scores that an observer of the training plan added, by name; not in `loss`.
    """

    num_correct: Tensor | None = None
    observed: dict[str, Score] | None = None


class CometForCausalLM(  # type: ignore[misc]  # saving and loading are our own
    AttachmentMixin, CheckpointMixin, CometPreTrainedModel, MemoryGenerationMixin
):
    """`CometModel` with the backbone's language-model head."""

    # A memory cannot forget its last tokens, which assisted decoding asks for; transformers then
    # refuses that mode with an error of its own.
    _is_stateful = True
    # Set by `cometlm.session`, which stands above.
    session_type: ClassVar[Callable[..., Any]]

    def __init__(self, config: CometModelConfig, backbone: PreTrainedModel | None = None) -> None:
        """Make a model of a backbone, whose config `config.backbone_config` is.

        Without a backbone it gets one of random weights, as any transformers model that is made
        of a config.
        """
        if backbone is None:
            config, backbone = _random_backbone(config)
        parts = take_apart(backbone)
        config.comet_config.check_positions(
            position_limit(parts.config), position_field(parts.config)
        )
        undo = Undo.of(backbone)
        super().__init__(config)
        self.model = CometModel(config, parts)
        self.lm_head = parts.lm_head
        # What a config says of scales and caps may be of another class than the backbone's.
        self._scales_logits = parts.sample is None or parts.sample.scaled
        self.vocab_size = self._vocabulary = config.vocab_size
        self._hold(undo)
        self.post_init()
        own = getattr(backbone, "generation_config", None)  # of somebody's class there may be none
        self.generation_config = GenerationConfig() if own is None else copy.deepcopy(own)
        self._begun = {name: sample(p) for name, p in self._backbone_weights().items()}
        if parts.sample is not None:
            self._check_against(parts.sample)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the backbone's head."""
        self.lm_head = new_embeddings

    def pack_weights(self, most_bytes: int | None = None) -> int:
        """Keep a second copy of linear layers' weights in the order that the CPU's kernels read.

        A token is then written faster, with the same numbers; see `core.packed_products`. Only
        bfloat16 on CPUs with products of it; elsewhere nothing is packed. Weights that are changed
        later are used as they then are, slower, until this is called again.

        Args:
            most_bytes: pack nothing where the copies would take more. Default: no limit.

        Returns:
            Bytes of the copies: as many as the layers' and the head's weights have.
        """
        self.unpack_weights()
        self.model.packed = PackedProducts.of(self, most_bytes)
        return self.model.packed.nbytes

    def unpack_weights(self) -> None:
        """Give the copies of `pack_weights` up."""
        if self.model.packed is not None:
            self.model.packed.undo()
            self.model.packed = None

    @can_return_tuple
    @takes_either_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CometCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        chunk_size: int | None = None,
        stride: int | None = None,
        capacity: int | None = None,
        **options: Any,
    ) -> CometCausalOutput:
        """Read text of any length; like any Hugging Face causal language model.

        Args:
            input_ids, attention_mask, past_key_values, use_cache, chunk_size, stride, capacity,
                options: see `CometModel.forward`.
            labels: [B, N]; each token's label is the next text token, across chunk borders. -100
                is not counted. Who has moved them already gives `shift_labels` instead, or beside
                them, as to any Hugging Face model.
            logits_to_keep: how many last positions get logits, or which; 0 is all. Default: all,
                but none when there are labels, since the loss needs only one chunk's at a time;
                `config.logits_with_labels` gives them then too, while the model is not trained.
            num_items_in_batch: divide the summed loss by this instead of by the labels counted.

        Returns:
            `loss` (a scalar), `logits` [B, kept, V], `past_key_values`, and with labels
            `num_correct`; a tuple of what there is with `return_dict=False`.

        Raises:
            ValueError, FloatingPointError: as `CometModel.forward`; also labels of another shape,
                or outside the vocabulary.
        """
        self._check_attached()
        input_ids = check_shape(input_ids)
        budget: Budget = {"chunk_size": chunk_size, "stride": stride, "capacity": capacity}
        if isinstance(past_key_values, FixedCache) and labels is None and use_cache is not False:
            rest = {"logits_to_keep": logits_to_keep, **options}
            return self._step(input_ids, attention_mask, past_key_values, budget, rest)
        common = (input_ids, attention_mask, past_key_values, use_cache)
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0, got {logits_to_keep}")
        if logits_to_keep is None and self.config.logits_with_labels and not self.training:
            logits_to_keep = 0
        shifted = options.pop("shift_labels", None)  # no parameter: a Trainer would ask for it
        targets = self._targets(labels, shifted, input_ids, attention_mask)
        if targets is not None and logits_to_keep is None:
            scored = Scored(self._loss_of_chunk, targets, list(self.lm_head.parameters()))
            out = self.model(*common, **budget, scored=scored, **options)
            summed, correct = out.summed.unbind()
            return CometCausalOutput(
                loss=summed / _items(targets, num_items_in_batch),
                num_correct=correct.detach(),
                observed=out.observed,
                **{CACHE: out.past_key_values},
            )
        keep = 0 if logits_to_keep is None else logits_to_keep
        only_last = keep if targets is None and isinstance(keep, int) else 0
        out = self.model(*common, **budget, **{"hidden_to_keep": only_last, **options})
        hidden = out.last_hidden_state
        loss = correct = None
        if targets is not None:
            summed, correct = self._summed_loss(hidden, targets).unbind()
            loss, correct = summed / _items(targets, num_items_in_batch), correct.detach()
        logits = self.logits(_kept(hidden, keep))
        past: dict[str, Any] = {CACHE: out.past_key_values}
        return CometCausalOutput(loss=loss, logits=logits, num_correct=correct, **past)

    def _targets(
        self,
        labels: Tensor | None,
        shifted: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
    ) -> Tensor | None:
        """What each position is to predict, [B, N], on the CPU.

        Where labels count decides what the head runs on: a chunk must not wait to hear that.

        Raises:
            ValueError: they have another shape than the ids, or are outside the vocabulary.
        """
        given = labels if shifted is None else shifted
        if given is None:
            return None
        if given.shape != input_ids.shape:
            name = "labels" if shifted is None else "shift_labels"
            raise ValueError(
                f"{name} have shape {tuple(given.shape)} but input_ids {tuple(input_ids.shape)}; "
                "they must be the same"
            )
        targets = (next_labels(given, attention_mask) if shifted is None else given).cpu()
        check_labels(targets, self.config.vocab_size)
        return targets.long()

    def _step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        fixed: FixedCache,
        budget: Budget,
        rest: dict[str, Any],
    ) -> CometCausalOutput:
        """Go on in buffers of fixed size where that can be; else as usual, and then into them."""
        said = {name for name, value in rest.items() if value is not None} - {"logits_to_keep"}
        if said <= _SAID_BY_GENERATE and fixed.can_step(input_ids, **budget):
            past: dict[str, Any] = {CACHE: fixed}
            return CometCausalOutput(logits=fixed.step(input_ids)[:, None], **past)
        value: dict[str, Any] = {"past_key_values": fixed.value(), "use_cache": True}
        out = self.forward(input_ids, attention_mask, **value, **budget, **rest)
        fixed.take_over(out.past_key_values)
        out[CACHE] = fixed
        return out

    @property
    def training_plan(self) -> TrainingPlan:
        """How the model reads while it is trained."""
        return self.model.training_plan

    @training_plan.setter
    def training_plan(self, plan: TrainingPlan) -> None:
        self.model.training_plan = plan

    def session(self, tokenizer: Any = None) -> Any:
        """A new `Session`: reads text or ids in a stream, is asked, forked and saved."""
        return self.session_type(self, tokenizer)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, n, V] of last hidden states [B, n, D]."""
        products: Tensor = self.lm_head(hidden)
        if not self._scales_logits:
            return products
        return final_logits(products, self.config.backbone_config)

    def _loss_of_chunk(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """As `_summed_loss`; the logits are kept for no backward pass."""
        again = self.training_plan.recomputation is not None  # then the whole chunk runs again
        if again or not torch.is_grad_enabled():
            return self._summed_loss(hidden, labels)
        return cast("Tensor", checkpoint(self._summed_loss, hidden, labels, use_reentrant=False))

    def _summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of hidden states [B, n, D] under labels [B, n]: [summed loss, labels that came first]."""
        counted = labels.cpu() != -100  # the head is wide: it never runs where nothing is asked
        where = counted.flatten().nonzero().flatten()
        logits = self.logits(hidden.flatten(0, 1).index_select(0, sent(where, hidden.device)))
        labels = sent(labels.cpu()[counted], hidden.device)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.detach().argmax(-1) == labels).sum()
        return torch.stack([loss, correct.to(loss.dtype)])


def _items(labels: Tensor, given: Tensor | int | None) -> Tensor | int:
    """What a summed loss is divided by."""
    if given is None:
        return (labels != -100).sum().clamp(min=1)
    return max(1, given) if isinstance(given, int) else given.clamp(min=1)  # a batch may have none


def _kept(hidden: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, int):
        return hidden[:, -keep:] if keep else hidden
    return hidden[:, keep]


def _random_backbone(config: CometModelConfig) -> tuple[CometModelConfig, PreTrainedModel]:
    """A backbone of random weights, and a config round its own."""
    if not isinstance(config, CometModelConfig):
        raise ValueError(
            f"config must be a CometModelConfig, got {type(config).__name__}: attach() gives a "
            "backbone a memory"
        )
    config = copy.deepcopy(config)
    text: Any = config.backbone_config
    if text is None:
        raise ValueError("backbone_config must be the config of a backbone, got None")
    if text._attn_implementation == NAME:
        text._attn_implementation = None  # of a model that was made of the same config
    backbone: PreTrainedModel = AutoModelForCausalLM.from_config(text)
    backbone.only_copy = True  # type: ignore[assignment]
    config.backbone_config = backbone.config
    return config, backbone


AutoModelForCausalLM.register(CometModelConfig, CometForCausalLM)
# A Trainer that smooths labels shifts those of the models that are named here, and of no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CometModelConfig.model_type] = CometForCausalLM.__name__
