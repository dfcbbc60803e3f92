"""One layer's cache in every format, filled with the same tokens, with the answers that are expected from it."""

import torch

from benchmarks.operators.peers import Batch, Peer, Shape
from benchmarks.timing import CallOnce, cold_copies
from vllm_int8kv.cache import reference


class CheckError(Exception):
    """An implementation's answer is wrong, or it ran otherwise than it was told; its time means nothing."""


PAGE_BYTES = 4096


def copies(cache: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Copies of a dense tensor, one after the other in one allocation, as vLLM's caches are.

    Allocations of a few megabytes each lie scattered over physical memory, where every implementation reads slower
    (by 7 to 13 % on the machine of the published tables).
    """
    stride = -(-cache.numel() * cache.itemsize // PAGE_BYTES) * PAGE_BYTES // cache.itemsize
    storage = torch.empty(count * stride, dtype=cache.dtype, device=cache.device)
    return [storage.as_strided(cache.shape, cache.stride(), i * stride).copy_(cache) for i in range(count)]


class Layers:
    """Copies of one layer's cache for each implementation, to be found cold in turn."""

    def __init__(self, shape: Shape, peers: list[Peer], seed: int, device: str = "cpu") -> None:
        self.shape, self.peers, self.seed, self.device = shape, peers, seed, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.query = 2 * self._normal(shape.num_tokens, shape.num_heads)
        order = torch.randperm(shape.num_blocks, generator=self.generator, device=device)
        self.batch = Batch(
            block_table=order.int().view(shape.num_seqs, -1),
            seq_lens=torch.tensor(shape.seq_lens, dtype=torch.int32, device=device),
            query_start_loc=torch.arange(shape.num_seqs + 1, dtype=torch.int32, device=device) * shape.query_len,
        )
        first = {peer.name: peer.allocate(shape) for peer in peers}
        self.expected: dict[str, dict[int, torch.Tensor]] = {peer.name: {} for peer in peers}
        self._fill(first)
        # Each as many as it takes itself: as many as the smallest needs would not fit into memory. On a CPU the caches
        # of all implementations are read between two turns of one, so each needs its share; 13 formats beside a
        # last-level cache of 480 MiB would take 26 GB otherwise. In a CUDA graph each has its turns in a row.
        sharers = len(peers) if device == "cpu" else 1
        counts = {
            name: max(2, -(-cold_copies(cache.numel() * cache.itemsize, device) // sharers))
            for name, cache in first.items()
        }
        self.num_copies = max(counts.values())
        self.caches = {name: copies(first.pop(name), count) for name, count in counts.items()}

    def _normal(self, num_tokens: int, num_heads: int) -> torch.Tensor:
        size = (num_tokens, num_heads, self.shape.head_size)
        return torch.randn(size, generator=self.generator, device=self.device).to(self.shape.torch_dtype)

    def _fill(self, caches: dict[str, torch.Tensor]) -> None:
        """Write every sequence's past; its last `query_len` tokens are left for `write_call`."""
        shape = self.shape
        in_block = torch.arange(shape.block_size, device=self.device)
        checked = {0, shape.num_seqs // 3, 2 * shape.num_seqs // 3, shape.num_seqs - 1}
        keys, values, slots = [], [], []
        for seq, (blocks, seq_len) in enumerate(zip(self.batch.block_table.long(), shape.seq_lens, strict=True)):
            past = seq_len - shape.query_len
            seq_slots = (blocks[:, None] * shape.block_size + in_block).flatten()[:seq_len]
            key = self._normal(seq_len, shape.num_kv_heads)
            value = self._normal(seq_len, shape.num_kv_heads)
            for peer in self.peers:
                if past:
                    peer.write(shape, key[:past], value[:past], caches[peer.name], seq_slots[:past])
                if seq in checked:
                    self.expected[peer.name][seq] = self._exact(self._rows(self.query, seq), *peer.stored(key, value))
            keys.append(key[past:])
            values.append(value[past:])
            slots.append(seq_slots[past:])
        self.key, self.value, self.slots = torch.cat(keys), torch.cat(values), torch.cat(slots)

    def _rows(self, tokens: torch.Tensor, seq: int) -> torch.Tensor:
        return tokens[seq * self.shape.query_len : (seq + 1) * self.shape.query_len]

    def _exact(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention in fp32, one KV head at a time to bound the memory of a long prefill."""
        shape = self.shape
        positions = torch.arange(len(key) - shape.query_len, len(key), device=self.device)
        mask = reference.visible_keys(positions, len(key), True, None)
        heads = query.float().chunk(shape.num_kv_heads, dim=1)
        out = [
            reference.attention(
                heads[h], key[:, h : h + 1], value[:, h : h + 1], mask, softmax_scale=shape.softmax_scale
            )[0]
            for h in range(shape.num_kv_heads)
        ]
        return torch.cat(out, dim=1)

    def check(self, peer: Peer) -> float:
        """Write this step's tokens to every copy, attend over the first, and return the relative L2 error.

        Their slots hold wrong values before, so that a thread that leaves some of them out is noticed.

        Raises:
            CheckError: it is above the implementation's tolerance.
        """
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        peer.write(self.shape, -self.key, -self.value, self.caches[peer.name][0], self.slots)
        torch.set_num_threads(num_threads)
        write = self.write_call(peer)
        for copy in range(len(self.caches[peer.name])):
            write(copy)
        out = torch.full_like(self.query, torch.nan)
        peer.plan(self.shape, self.batch)(self.query, self.caches[peer.name][0], out)
        expected = self.expected[peer.name]
        want = torch.cat(list(expected.values()))
        got = torch.cat([self._rows(out, seq) for seq in expected]).float()
        rel_error = reference.relative_error(got, want)
        if not rel_error <= peer.tolerance:
            raise CheckError(f"{peer.name} differs from its reference by {rel_error:.1e}, allowed {peer.tolerance:.0e}")
        return rel_error

    def write_call(self, peer: Peer) -> CallOnce:
        """Writes this step's tokens to the next copy of the cache."""
        caches = self.caches[peer.name]

        def write(turn: int) -> None:
            peer.write(self.shape, self.key, self.value, caches[turn % len(caches)], self.slots)

        return write

    def attend_call(self, peer: Peer) -> CallOnce:
        """Attends over the next copy of the cache."""
        caches, out = self.caches[peer.name], torch.empty_like(self.query)
        attend = peer.plan(self.shape, self.batch)

        def run(turn: int) -> None:
            attend(self.query, caches[turn % len(caches)], out)

        if self.device == "cuda":  # some compile at the first call, or keep something of each cache
            for copy in range(len(caches)):
                run(copy)
        return run
