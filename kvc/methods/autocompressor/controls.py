"""The control tokens of variable-length summaries: `<sum>` begins the compression loop, `<eoc>` ends it.

Neither is ever text: they are no labels, and cannot be generated.

Shapes: B batch, D width of the input embeddings, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvc.errors import UserError
from kvc.methods.autocompressor.stack import Head

SUM, EOC = "<sum>", "<eoc>"


class Stop(NamedTuple):
    """How likely the loop ends.

    Attributes:
        logit: Logit of its probability, fp32 `[B]`.
        top: Whether nothing else is more likely, bool `[B]`.
    """

    logit: torch.Tensor
    top: torch.Tensor


class Controls(nn.Module, ABC):
    """Where the two tokens live.

    Args:
        sum_token_id: Id of `<sum>`.
        eoc_token_id: Id of `<eoc>`.
    """

    def __init__(self, sum_token_id: int, eoc_token_id: int) -> None:
        super().__init__()
        self.sum_token_id, self.eoc_token_id = sum_token_id, eoc_token_id

    def among(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are control tokens, bool of the shape of `input_ids`."""
        return (input_ids == self.sum_token_id) | (input_ids == self.eoc_token_id)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model whose tables lack the two tokens.

        Raises:
            UserError: If so.
        """

    def check_trainable(self, model: PreTrainedModel) -> None:
        """Refuse to train a model that leaves the two tokens as they are.

        Raises:
            UserError: If it would.
        """

    def unwritable(self) -> list[int]:
        """Ids of the vocabulary that are never text."""
        return []

    @abstractmethod
    def embed(self, embedding: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings `[B, T, D]` of tokens, of which some may be `<sum>`."""

    @abstractmethod
    def start(self, embedding: nn.Module) -> torch.Tensor:
        """Input embedding `[D]` of `<sum>`."""

    @abstractmethod
    def stop(self, head: Head, hidden: torch.Tensor) -> Stop:
        """How likely the loop ends, by its hidden states `[B, D]`."""

    @abstractmethod
    def logits(self, head: Head, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., V]` of text."""


class TableControls(Controls):
    """Control tokens with rows in the tables of the base model, which trains them with all others.

    Where the tables are frozen, as under LoRA, `train_rows` makes fp32 copies of the two rows that are trained and read
    in their place.

    Args:
        sum_token_id: Id of `<sum>`.
        eoc_token_id: Id of `<eoc>`.
        rival: Whether `<sum>` is one of the tokens that `<eoc>` is weighed against, as in the original.
    """

    def __init__(self, sum_token_id: int, eoc_token_id: int, rival: bool = True) -> None:
        super().__init__(sum_token_id, eoc_token_id)
        self.rival = rival
        self.sum_row: nn.Parameter | None = None
        self.eoc_row: nn.Parameter | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Those of a tokenizer.

        Raises:
            UserError: If it lacks one.
        """
        known: dict[str, int] = tokenizer.get_vocab()
        for name in (SUM, EOC):
            if name not in known:
                raise UserError(
                    f"the tokenizer has no token {name}: add {SUM} and {EOC} to it and to the base model, or give the "
                    "summary control tokens of its own"
                )
        return cls(known[SUM], known[EOC])

    def check(self, model: PreTrainedModel) -> None:
        """See `Controls`."""
        table: Any = model.get_input_embeddings()
        rows, last = len(table.weight), max(self.sum_token_id, self.eoc_token_id)
        if last >= rows:
            raise UserError(f"{SUM}: the base model has no row for token {last}, resize its {rows} embeddings")

    @torch.no_grad()
    def train_rows(self, model: PreTrainedModel) -> None:
        """Train copies of the two rows from now on. `<sum>` is no rival of `<eoc>` any more."""
        self.check(model)
        # In tied tables the copy for reading would stand in the head too, once it is written to a file.
        self.rival = False
        self.sum_row = nn.Parameter(self.start(model.get_input_embeddings()).float())
        head: Any = model.get_output_embeddings()
        self.eoc_row = nn.Parameter(head.weight[self.eoc_token_id].float().clone())

    def check_trainable(self, model: PreTrainedModel) -> None:
        """See `Controls`."""
        tables = {"input embeddings": model.get_input_embeddings(), "LM head": model.get_output_embeddings()}
        frozen = [name for name, table in tables.items() if not any(p.requires_grad for p in table.parameters())]
        if frozen and self.sum_row is None:
            raise UserError(
                f"control_tokens: the {frozen[0]} of the base model are frozen, so {SUM} and {EOC} would never be "
                "trained: call `train_rows`, or give the summary control tokens of its own"
            )

    def unwritable(self) -> list[int]:
        """See `Controls`."""
        return [self.sum_token_id, self.eoc_token_id]

    def embed(self, embedding: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Controls`."""
        embedded: torch.Tensor = embedding(input_ids)
        if self.sum_row is None:
            return embedded
        mine = (input_ids == self.sum_token_id)[..., None]
        return torch.where(mine, self.sum_row.to(embedded.dtype), embedded)

    def start(self, embedding: nn.Module) -> torch.Tensor:
        """See `Controls`."""
        if self.sum_row is not None:
            return self.sum_row
        row = torch.tensor(self.sum_token_id, device=next(embedding.parameters()).device)
        embedded: torch.Tensor = embedding(row)
        return embedded

    def stop(self, head: Head, hidden: torch.Tensor) -> Stop:
        """See `Controls`: `<eoc>` against all other tokens."""
        logits = head(hidden, self.eoc_row).float()
        mine = logits[:, self.eoc_token_id if self.eoc_row is None else -1]
        logits = logits if self.eoc_row is None else logits[:, :-1]
        aside = [self.eoc_token_id] if self.rival else self.unwritable()
        others = logits.index_fill(-1, torch.tensor(aside, device=logits.device), -torch.inf)
        return Stop(mine - others.logsumexp(-1), mine > others.amax(-1))

    def logits(self, head: Head, hidden: torch.Tensor) -> torch.Tensor:
        """See `Controls`; in eval mode the two tokens are impossible."""
        logits = head(hidden)
        if self.training:
            return logits
        both = torch.tensor(self.unwritable(), device=logits.device)
        return logits.index_fill(-1, both, -torch.inf)


class OwnControls(Controls):
    """Control tokens with weights of their own beside the tables, trained in fp32 whatever else is trained.

    Their ids follow the vocabulary: `<sum>` is V, `<eoc>` V + 1.

    Args:
        model: The base model.
        head: How `<eoc>` is predicted. `vocabulary`: as one more token beside all others; `binary`: alone, by a
            logistic regression, whose probability does not begin near 0.
        stop_bias: Logit of stopping at the start, for the binary head.

    Raises:
        UserError: If there is no such head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Literal["vocabulary", "binary"] = "binary",
        stop_bias: float = -2.0,
    ) -> None:
        if head not in ("vocabulary", "binary"):
            raise UserError(f"stop_head: '{head}' is not one of vocabulary, binary")
        table: Any = model.get_input_embeddings()
        rows, width = table.weight.shape
        super().__init__(rows, rows + 1)
        self.head = head
        device = table.weight.device
        self.sum_embedding = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device).normal_(std=0.02))
        self.eoc_weight = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device).normal_(std=0.02))
        bias = torch.tensor(float(stop_bias), device=device)
        self.eoc_bias = nn.Parameter(bias) if head == "binary" else None

    def embed(self, embedding: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Controls`."""
        ordinary: torch.Tensor = embedding(input_ids.masked_fill(self.among(input_ids), 0))
        mine = (input_ids == self.sum_token_id)[..., None]
        return torch.where(mine, self.sum_embedding.to(ordinary.dtype), ordinary)

    def start(self, embedding: nn.Module) -> torch.Tensor:
        """See `Controls`."""
        return self.sum_embedding

    def stop(self, head: Head, hidden: torch.Tensor) -> Stop:
        """See `Controls`."""
        if self.eoc_bias is not None:
            logit = hidden.float() @ self.eoc_weight + self.eoc_bias
            return Stop(logit, logit > 0)
        logits = head(hidden, self.eoc_weight).float()
        mine, others = logits[:, -1], logits[:, :-1]
        return Stop(mine - others.logsumexp(-1), mine > others.amax(-1))

    def logits(self, head: Head, hidden: torch.Tensor) -> torch.Tensor:
        """See `Controls`: the vocabulary does not hold the two tokens."""
        return head(hidden)
