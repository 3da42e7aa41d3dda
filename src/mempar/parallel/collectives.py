"""The one collective that memory parallelism needs: an all-to-all of uneven parts, counted.

gloo refuses an all-gather of uneven sizes but takes uneven and empty all-to-alls in every dtype, and
NCCL takes both, so everything is expressed as an all-to-all.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mempar.marks import Marks
from mempar.parallel.ledger import ByteLedger


class MemberGroup:
    """A process group together with the ledger of what this rank sends in it.

    Attributes:
        process_group: torch's group; None stands for this rank alone, where nothing is sent.
        rank: this rank's position.
        size: number of members.
        ledger: counts bytes.
        name: of the group, in marks.
        marks: take the time.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        ledger: ByteLedger,
        *,
        name: str = "mp",
        marks: Marks | None = None,
    ) -> None:
        self.process_group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.ledger = ledger
        self.name = name
        self.marks = marks or Marks()

    def all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int], phase: str) -> Tensor:
        """Send part p of a flat tensor to member p. Every member must call it, with no items too.

        Args:
            send: `[sum of send_sizes, ...]`, contiguous.
            send_sizes: rows for each member, this one included.
            receive_sizes: rows from each member.
            phase: name under which the bytes are counted.

        Returns:
            `[sum of receive_sizes, ...]`, parts in member order. The host blocks on gloo; on NCCL the
            call is ordered on the current stream.
        """
        if self.size == 1:
            return send
        if send.dtype == torch.int16:
            # gloo and NCCL have no 16-bit integers: they travel as pairs of bytes.
            pairs = self.all_to_all(send.view(torch.uint8).view(-1, 2), send_sizes, receive_sizes, phase)
            return pairs.contiguous().view(torch.int16).view(-1)
        row_bytes = send.element_size() * send[:1].numel() if len(send) else 0
        sent_bytes = row_bytes * (len(send) - send_sizes[self.rank])
        self.ledger.add(phase, sent_bytes)
        received = send.new_empty(sum(receive_sizes), *send.shape[1:])
        with self.marks.span(phase, self.name, sent_bytes, row_bytes * len(send)):
            dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=self.process_group)
        return received

    def share(self, part: Tensor, sizes: list[int], phase: str) -> Tensor:
        """Give every member this rank's part: an all-gather of `sizes[p]` rows from member p."""
        if self.size == 1:
            return part
        copies = part.repeat(self.size, *[1] * (part.dim() - 1))
        return self.all_to_all(copies, [len(part)] * self.size, sizes, phase)

    def exchange_counts(self, counts: list[list[int]], device: torch.device, phase: str) -> list[list[int]]:
        """Tell each member some integers and learn its own; the host waits for them.

        Args:
            counts: for each member the integers meant for it, equally many for all.
            device: where the collective runs.
            phase: name under which the bytes are counted.

        Returns:
            For each member the integers that it sent here.
        """
        send = torch.tensor(counts, dtype=torch.int64, device=device)
        ones = [1] * self.size
        return self.all_to_all(send, ones, ones, phase).tolist()
