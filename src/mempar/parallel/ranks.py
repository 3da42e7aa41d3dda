"""Rank arithmetic of the memory dimension: integers only, no process group is made here.

World ranks follow megatron's default order: tensor fastest, then context, data, pipeline. One
pipeline stage is a contiguous block of `tp * cp * dp` ranks; the memory-parallel groups are
contiguous runs of P ranks inside it. Within such a group rows are fastest: member m holds row shard
`m % R` and column shard `m // R`, so that row shards fall inside a node. For experts a stage is cut
anew: tensor fastest, then expert, then the ranks that hold copies of the same experts.
"""

from dataclasses import dataclass

from mempar.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Sizes of all parallel dimensions of a run.

    Attributes:
        world: number of ranks.
        tp: tensor-parallel size.
        cp: context-parallel size.
        pp: pipeline-parallel size.
        ep: expert-parallel size.
        mp: memory-parallel size P.
        mp_rows: row shards R; column shards are P / R.
        mp_hops: hops that sums and output gradients take in a memory-parallel group; two need a grid.
    """

    world: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    mp: int = 1
    mp_rows: int = 1
    mp_hops: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit each other."""
        model_ranks = self.tp * self.cp * self.pp
        if self.world % model_ranks:
            raise ConfigError(
                f"{self.world} ranks do not divide into tp={self.tp} x cp={self.cp} x pp={self.pp} = {model_ranks}; "
                "the data-parallel size must be whole; use a multiple of that number of ranks."
            )
        stage = self.stage_size
        if self.cp * self.dp % self.ep:
            choices = ", ".join(str(p) for p in range(1, self.cp * self.dp + 1) if self.cp * self.dp % p == 0)
            raise ConfigError(
                f"parallel.ep={self.ep} needs a divisor of the ranks that hold different tokens, but "
                f"cp*dp = {self.cp}*{self.dp} = {self.cp * self.dp} on {self.world} ranks; use parallel.ep={choices}, "
                f"or start a multiple of {self.tp * self.ep * self.pp} ranks."
            )
        if stage % self.mp:
            choices = ", ".join(str(p) for p in range(1, stage + 1) if stage % p == 0)
            raise ConfigError(
                f"parallel.mp={self.mp} needs a divisor of the ranks of one pipeline stage, but "
                f"tp*cp*dp = {self.tp}*{self.cp}*{self.dp} = {stage} on {self.world} ranks; "
                f"use parallel.mp={choices}, or start a multiple of {self.mp} ranks per stage."
            )
        if self.mp % self.mp_rows:
            raise ConfigError(
                f"parallel.mp_rows={self.mp_rows} does not divide parallel.mp={self.mp}; a grid has "
                "mp_rows x (mp / mp_rows) shards; use a divisor of mp."
            )
        if self.mp_hops == 2 and not 1 < self.mp_rows < self.mp:
            raise ConfigError(
                f"parallel.mp_hops=2 with {self.mp_rows} row x {self.mp_columns} column shards: the hops go over row "
                "shards and over column shards, so a grid needs several of both; set parallel.mp_rows to a divisor of "
                f"parallel.mp={self.mp} between the two, or parallel.mp_hops=1."
            )

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pp

    @property
    def mp_columns(self) -> int:
        """W, column shards."""
        return self.mp // self.mp_rows

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the parallel dimensions, by name."""
        names = ("world", "tp", "cp", "pp", "dp", "ep", "mp", "mp_rows", "mp_columns", "mp_hops")
        return {name: getattr(self, name) for name in names}

    def stage_of(self, rank: int) -> int:
        """Pipeline stage of a world rank."""
        return rank // self.stage_size

    def tp_rank(self, rank: int) -> int:
        """Tensor-parallel rank of a world rank."""
        return rank % self.tp

    def dp_rank(self, rank: int) -> int:
        """Data-parallel rank of a world rank (context parallelism not counted)."""
        return rank % self.stage_size // (self.tp * self.cp)

    def expert_rank(self, rank: int) -> int:
        """Position of a world rank in its expert-parallel group: the share of the experts that it holds."""
        return rank % self.stage_size // self.tp % self.ep

    def expert_dp_rank(self, rank: int) -> int:
        """Position of a world rank among those that hold the same experts."""
        return rank % self.stage_size // (self.tp * self.ep)

    def memory_rank(self, rank: int) -> int:
        """Position of a world rank in its memory-parallel group: the shard that it holds."""
        return rank % self.stage_size % self.mp

    def memory_groups(self, stages: tuple[int, ...]) -> list[list[int]]:
        """World ranks of every memory-parallel group of some pipeline stages."""
        return [
            list(range(start, start + self.mp))
            for stage in stages
            for start in range(stage * self.stage_size, (stage + 1) * self.stage_size, self.mp)
        ]

    def inside_groups(self, stages: tuple[int, ...]) -> list[list[int]]:
        """World ranks of one column shard of a memory-parallel group: the hop inside a node, if there are two."""
        rows = self.mp_rows
        groups = self.memory_groups(stages) if self.mp_hops == 2 else []
        return [group[start : start + rows] for group in groups for start in range(0, self.mp, rows)]

    def across_groups(self, stages: tuple[int, ...]) -> list[list[int]]:
        """World ranks of one row shard of a memory-parallel group: the hop across nodes, if there are two."""
        groups = self.memory_groups(stages) if self.mp_hops == 2 else []
        return [group[row :: self.mp_rows] for group in groups for row in range(self.mp_rows)]

    def copy_groups(self, stages: tuple[int, ...]) -> list[list[int]]:
        """World ranks that hold the same shard of a table on these stages: replicas, and copies on other stages."""
        groups = self.memory_groups(stages)
        return [[group[shard] for group in groups] for shard in range(self.mp)] if groups else []
