"""sample_tokens against its float64 twin: the drawn token, the support of the filters, frequencies, edge values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from draws import INF, Arguments, arguments, assert_follows_tree, assert_frequencies, assert_support
from torch import Tensor

from lpd_ext import ops, reference

# ---- distributions: support and frequencies ----


def branches(tie: int = 1) -> Tensor:
    """Conditional and unconditional logits [2, V] in exact steps, so that all boundaries are well apart.

    `tie` tokens at a time have the same logits. V spans several of the kernel's blocks.
    """
    rank = torch.randperm(1200, generator=torch.Generator().manual_seed(3)) // tie
    return torch.stack([-rank / 16, (rank % 3) / 64])


DISTRIBUTIONS: dict[str, dict[str, float]] = {
    "filters off": {},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "top-k": {"top_k": 31},
    "top-k 1": {"top_k": 1},
    "top-p": {"top_p": 0.7},
    "small top-p": {"top_p": 0.01},
    "both, k decides": {"top_k": 9, "top_p": 0.99},
    "both, p decides": {"top_k": 100, "top_p": 0.6, "temperature": 2.0},
    "guidance 3": {"unconditional": 1, "guidance": 3.0},
    "guidance 0": {"unconditional": 1, "guidance": 0.0, "top_k": 500},
    "everything": {"unconditional": 1, "guidance": 3.0, "temperature": 1.5, "top_k": 24, "top_p": 0.9},
}


@pytest.mark.parametrize("tie", [1, 2])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution(name: str, tie: int, backend: torch.device, is_emulated: bool) -> None:
    count = 640 if is_emulated else 12_800  # a millisecond each, emulated
    args = arguments(branches(tie), count, **DISTRIBUTIONS[name])
    probabilities = args.take(torch.tensor([0])).probabilities()
    tokens = args.draw(backend)
    assert_follows_tree(tokens, args, probabilities)
    assert_frequencies(tokens, probabilities[0])
    if count * probabilities[probabilities > 0].min() > 12.8:  # else these draws cannot reach every token
        assert_support(tokens, probabilities[0])
    else:
        assert is_emulated or name in ("filters off", "temperature 0.5", "temperature 2", "guidance 3", "guidance 0")


def before_temperature(args: Arguments) -> Tensor:
    kept = args._replace(temperature=torch.ones_like(args.temperature)).probabilities() > 0
    return args._replace(top_k=None, top_p=None).probabilities() * kept


def without_last(args: Arguments) -> Tensor:
    """Loses one of the two equal tokens that stand last after the filters."""
    probabilities = args.probabilities()
    last = probabilities.masked_fill(probabilities == 0, INF).argmin(-1, keepdim=True)
    return probabilities.scatter(-1, last, 0.0)


def swapped(args: Arguments) -> Arguments:
    return args._replace(conditional_row=args.unconditional_row, unconditional_row=args.conditional_row)


# Options over those of "everything", in which tokens tie in pairs, and the mistaken distribution.
MISTAKES: dict[str, tuple[dict[str, float], Callable[[Arguments], Tensor]]] = {
    "top-p before temperature": ({}, before_temperature),
    "top-p ignores ties": ({}, without_last),
    "top-p loses the token that crosses p": ({}, lambda a: a._replace(top_p=a.top_p - 0.05).probabilities()),
    "top-k ignores ties": ({"top_k": 7, "top_p": 1.0}, without_last),
    "k - 1": ({"top_k": 7}, lambda a: a._replace(top_k=a.top_k - 1).probabilities()),
    "k + 1": ({"top_k": 8}, lambda a: a._replace(top_k=a.top_k + 1).probabilities()),
    "swapped branches": ({}, lambda a: swapped(a).probabilities()),
    "guidance off by one": ({}, lambda a: a._replace(guidance=a.guidance - 1).probabilities()),
    "temperature inverted": ({}, lambda a: a._replace(temperature=1 / a.temperature).probabilities()),
    "temperature ignored": ({}, lambda a: a._replace(temperature=torch.ones(1)).probabilities()),
    "ids off by one": ({}, lambda a: a.probabilities().roll(1, -1)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparisons_reject(name: str) -> None:
    """Both comparisons pass for the twin, and fail for one with a mistake, on the same uniforms."""
    options, mistaken = MISTAKES[name]
    args = arguments(branches(tie=2), 12_800, **(DISTRIBUTIONS["everything"] | options))
    one = args.take(torch.tensor([0]))

    def drawn_from(probabilities: Tensor) -> Tensor:
        return reference.descend(probabilities.expand(len(args.seed), -1), args.seed, args.cell)

    right, wrong = one.probabilities(), mistaken(one)
    assert_follows_tree(drawn_from(right), args, right)
    assert_frequencies(drawn_from(right), right[0])
    assert_support(drawn_from(right), right[0])
    with pytest.raises(AssertionError):
        assert_follows_tree(drawn_from(wrong), args, right)
    with pytest.raises(AssertionError):
        assert_frequencies(drawn_from(wrong), right[0])


def test_the_comparisons_reject_uniforms_that_ignore_the_cell() -> None:
    args = arguments(branches(), 512)
    probabilities = args.take(torch.tensor([0])).probabilities()
    tokens = reference.sample_tokens(*args._replace(cell=torch.zeros(512, dtype=torch.int64)))
    with pytest.raises(AssertionError):
        assert_follows_tree(tokens, args, probabilities)
    with pytest.raises(AssertionError):
        assert_frequencies(tokens, probabilities[0])


# ---- values: every size, mixed rows, edges ----


@cache
def mixed_batch(vocab_size: int, dtype: torch.dtype) -> tuple[Arguments, Tensor]:
    """Tokens with all combinations of temperature, top-k, top-p and guidance, and their probabilities."""
    generator = torch.Generator().manual_seed(vocab_size)
    count = 72
    i = torch.arange(count)
    args = arguments(
        (3 * torch.randn(8, vocab_size, generator=generator)).to(dtype),
        count,
        conditional=i % 8,
        unconditional=torch.where(i % 5 == 0, -1, (i + 3) % 8),
        guidance=torch.tensor([4.8, 1.0, 0.0, 7.3])[i % 4],
        temperature=torch.tensor([1.0, 0.0, 0.5, 2.0])[i // 2 % 4],
        top_k=torch.tensor([0, 5, 900, 1])[i // 3 % 4],
        top_p=torch.tensor([1.0, 0.95, 0.3])[i // 7 % 3],
        seed=torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        cell=torch.randint(0, 1024, (count,), generator=generator),
    )
    return args, torch.cat([args.take(part).probabilities() for part in i.split(8)])


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 129, 1000, 16384])
def test_sizes_and_mixed_parameters(vocab_size: int, backend: torch.device) -> None:
    args, probabilities = mixed_batch(vocab_size, torch.float32)
    tokens = args.draw(backend)
    assert_follows_tree(tokens, args, probabilities)
    assert (tokens != reference.sample_tokens(*args)).sum() <= 1  # all equal, bar one at a boundary
    greedy = args.temperature == 0
    assert tokens[greedy].equal(probabilities[greedy].argmax(-1))


def test_large_vocabulary(backend: torch.device) -> None:
    """17 levels, of which the last takes a fifth Philox draw; hot, so that neighbours are about as likely."""
    logits = 3 * torch.randn(2, 131072, generator=torch.Generator().manual_seed(5))
    args = arguments(
        logits, 64, unconditional=[-1, 1, 1, -1] * 16, guidance=3.0, temperature=9.0, top_k=[0, 0, 900, 3] * 16,
        top_p=[1.0, 0.9] * 32,
    )  # fmt: skip
    assert_follows_tree(args.draw(backend), args, args.probabilities())


def test_what_matters_comes_late(backend: torch.device) -> None:
    """Behind the first 32 chunks of 1,024 ids: the largest logit, and nearly all the weight."""
    logits = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(6))
    logits[0, 36_000:] += 200.0
    logits[0, 39_990] = logits[0, 39_999] = 250.0
    args = arguments(logits, 64, temperature=[30.0] * 63 + [0.0], top_k=[0, 5, 900, 4001] * 16, top_p=[0.9, 1.0] * 32)
    tokens = args.draw(backend)
    assert_follows_tree(tokens, args, args.probabilities())
    assert tokens[-1] == 39_990


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_mixed_in_fp32(dtype: torch.dtype, backend: torch.device) -> None:
    for vocab_size in (7, 1000):
        args, probabilities = mixed_batch(vocab_size, dtype)
        tokens = args.draw(backend)
        assert_follows_tree(tokens, args, probabilities)
        assert tokens.equal(args._replace(logits=args.logits.float()).draw(backend))


def test_strided_rows(backend: torch.device) -> None:
    args, _ = mixed_batch(1000, torch.float32)
    buffer = torch.full((16, 1013), math.nan)
    buffer[::2, 5:1005] = args.logits
    assert args._replace(logits=buffer[::2, 5:1005]).draw(backend).equal(args.draw(backend))


def test_greedy_takes_the_lowest_id(backend: torch.device) -> None:
    for vocab_size in (1, 2, 7, 16, 129, 513, 1000):
        for first in {0, 1, 6, 15, 128, 511, 512, vocab_size - 1} & set(range(vocab_size)):
            logits = -torch.arange(vocab_size).float()[None] - 100
            logits[0, first] = logits[0, -1] = 3.5
            args = arguments(logits, 3, temperature=0.0, top_k=[0, 2, 1], top_p=[1.0, 0.5, 0.1])
            assert args.draw(backend).tolist() == [first] * 3


def test_thresholds_of_top_k(backend: torch.device) -> None:
    """Every k, over values with ties, both zeros, subnormals, huge ones and masked ones."""
    values = [0.0, -0.0, 1e-40, -1e-40, 2.0, 2.0, 2.0, -3.0, -3.0, 5.0, 1e38, -1e38, -INF, -INF, 1.0, 4.0, 4.0]
    for extra in (0, 40):
        logits = torch.tensor([values + [2.5] * extra])
        k = torch.arange(logits.shape[1] + 3)
        # Temperature 1e38 gives all finite tokens weight.
        count = 64
        args = arguments(logits, count * len(k), temperature=1e38, top_k=k.repeat_interleave(count), seed=7, cell=None)
        tokens = args.draw(backend).view(len(k), count)
        probabilities = args.probabilities()
        assert_follows_tree(tokens.flatten(), args, probabilities)
        kept = probabilities[::count] > 0
        descending = logits[0].sort(descending=True).values
        for rank in range(1, logits.shape[1]):
            assert kept[rank].equal((logits[0] >= descending[rank - 1]) & (logits[0] > -INF))


def test_thresholds_of_top_p(backend: torch.device) -> None:
    """Every p between the steps of the CDF of values with ties, with masked and vanishing tokens among them."""
    weights = torch.tensor([8.0, 4.0, 4.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.0, 1e-30, 0.5]) / 22
    logits = weights.log()[None, torch.randperm(11, generator=torch.Generator().manual_seed(2))]
    p = (torch.arange(44) + 0.5) / 44  # steps of the CDF are multiples of 1/44
    args = arguments(logits, 256 * 44, top_p=p.repeat_interleave(256))
    tokens = args.draw(backend)
    assert_follows_tree(tokens, args, args.probabilities())
    least = logits[0, tokens].view(44, 256).amin(-1)
    steps = torch.tensor([16, 16, 4, 6, 2])
    assert least.equal((torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5]) / 22).log().repeat_interleave(steps))


def test_one_huge_logit_among_ordinary_ones(backend: torch.device) -> None:
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(8))
    logits[0, 1234] = 1e30
    args = arguments(logits, 64, temperature=1e29, top_k=[0, 5, 900, 2999] * 16)
    assert_follows_tree(args.draw(backend), args, args.probabilities())


def test_thresholds_between_neighbouring_floats(backend: torch.device) -> None:
    """Nothing but an ulp tells them apart, and the others are far away."""
    close = [1.0, 1.0 + 2**-23, 1.0 + 2**-23, 1.0 + 2**-23, 1.0 + 2**-22]
    logits = torch.tensor([[*close, *(-1e30 * 1.1**i for i in range(60))]])
    k = torch.arange(1, 7)
    args = arguments(logits, 64 * 6, temperature=1e32, top_k=k.repeat_interleave(64))
    tokens = args.draw(backend).view(6, 64)
    for row, kept in zip(
        tokens.tolist(), [{4}, {1, 2, 3, 4}, {1, 2, 3, 4}, {1, 2, 3, 4}, {0, 1, 2, 3, 4}], strict=False
    ):
        assert set(row) == kept


def test_infinite_logits_are_drawn_alone(backend: torch.device) -> None:
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(9))
    logits[0, [5, 2990]] = INF
    for top_k, top_p in ((0, 1.0), (1, 1.0), (2, 1.0), (900, 1.0), (0, 0.3), (0, 0.9), (900, 0.7)):
        tokens = arguments(logits, 64, top_k=top_k, top_p=top_p).draw(backend)
        assert set(tokens.tolist()) == {5, 2990}


@pytest.mark.parametrize(("temperature", "winner"), [(1e-45, True), (1e-30, True), (1e-3, True), (3e38, False)])
def test_extreme_temperatures(temperature: float, winner: bool, backend: torch.device) -> None:
    logits = torch.tensor([[1.0, -50.0, 3.0, 3.0 - 2**-4, 80.0, 80.25, -1e4]])
    args = arguments(logits, 256, temperature=temperature)
    tokens = args.draw(backend)
    if winner:
        assert tokens.eq(5).all()
    else:
        assert_follows_tree(tokens, args, torch.full((1, 7), 1 / 7, dtype=torch.float64))


def test_masked_vocabulary(backend: torch.device) -> None:
    """A token that the conditional branch excludes is never drawn, whatever the other branch says."""
    vocab_size = 1100
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(4))
    masked = torch.tensor([0, 1, 300, 511, 512, 513, 1098, 1099])
    logits[:2, masked] = -INF  # row 2 excludes nothing
    for unconditional in (-1, 1, 2):
        args = arguments(
            logits,
            1024,
            unconditional=unconditional,
            guidance=2.0,
            temperature=5.0,
            top_k=torch.tensor([0, 1097, 1095])[torch.arange(1024) % 3],
        )
        tokens = args.draw(backend)
        assert_follows_tree(tokens, args, args.probabilities())
        assert not torch.isin(tokens, masked).any()


def test_smallest_and_largest_uniform(backend: torch.device) -> None:
    """u = 0 goes left unless nothing is there, u = 1 - 2^-24 right unless nothing is there, however sums round."""
    smallest, largest = 14883995, 38471471  # cells whose first uniforms at seed 0 these are
    assert reference.uniform(torch.tensor(0), torch.tensor([smallest, largest])).tolist() == [0, 1 - 2.0**-24]
    values = torch.randn(100, 1300, generator=torch.Generator().manual_seed(6))
    left, right = torch.arange(1300) < 1024, torch.arange(1300) >= 1024
    for cell, given, expected in [
        (smallest, left, left),
        (smallest, right, right),
        (smallest, left | right, left),
        (largest, left, left),
        (largest, right, right),
        (largest, left | right, right),
    ]:
        for top_k in (0, 1299):
            logits = values.masked_fill(~given, -INF)
            args = arguments(logits, 100, conditional=torch.arange(100), top_k=top_k, seed=0, cell=cell)
            assert expected[args.draw(backend)].all()


def test_rounding_of_the_logits_hardly_matters(backend: torch.device, is_emulated: bool) -> None:
    """Noise as large as a GEMM's rounding changes far fewer draws than it would through an inverse CDF."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(1, 4096, generator=generator)
    noisy = logits + 1e-4 * torch.randn(1, 4096, generator=generator)
    count = 4_000 if is_emulated else 40_000
    args, perturbed = arguments(logits, count), arguments(noisy, count)
    changed = (args.draw(backend) != perturbed.draw(backend)).sum()
    uniform = reference.uniform(args.seed, args.cell).double()
    by_cdf = [torch.searchsorted(x.double().softmax(-1)[0].cumsum(-1), uniform) for x in (logits, noisy)]
    assert (by_cdf[0] != by_cdf[1]).sum() > 10 * changed


def test_infinite_logits_share_all_the_probability(backend: torch.device) -> None:
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(4))
    logits[0, [17, 600, 699]] = INF
    args = arguments(logits, 600, temperature=[0.0, 1.0, 7.0] * 200, top_k=[0, 0, 2] * 200)
    tokens = args.draw(backend)
    assert_follows_tree(tokens, args, args.probabilities())
    assert set(tokens.tolist()) == {17, 600, 699}
    assert set(tokens[::3].tolist()) == {17}


# ---- independence ----


def test_a_token_depends_on_its_own_arguments_alone(backend: torch.device) -> None:
    args, _ = mixed_batch(16384, torch.float32)
    expected = args.draw(backend)
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(6))
    assert args.take(order).draw(backend).equal(expected[order])
    for m in (0, 19, 71):
        assert args.take(torch.tensor([m])).draw(backend).item() == expected[m]
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(9))
    moved = args._replace(
        logits=torch.cat([args.logits.flip(0), args.logits[rows.argsort()]]),
        conditional_row=(8 + rows[args.conditional_row.long()]).int(),
        unconditional_row=torch.where(args.unconditional_row < 0, -1, 8 + rows[args.unconditional_row.long()]).int(),
    )
    assert moved.draw(backend).equal(expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert args.draw(backend).equal(expected)
    finally:
        torch.set_num_threads(threads)


def test_cells_and_seeds_give_different_draws(backend: torch.device) -> None:
    logits = torch.zeros(1, 16384)
    by_cell = arguments(logits, 64, seed=11, cell=torch.arange(64)).draw(backend)
    by_seed = arguments(logits, 64, seed=torch.arange(64), cell=11).draw(backend)
    by_high_word = arguments(logits, 64, seed=torch.arange(64) << 32, cell=11).draw(backend)
    tokens = torch.cat([by_cell, by_seed, by_high_word])
    assert len(set(tokens.tolist())) > 185  # of 192, most birthdays apart


def test_no_tokens(backend: torch.device) -> None:
    for rows in (0, 3):
        tokens = arguments(torch.zeros(rows, 50), 0, top_k=5, top_p=0.5).draw(backend)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (0,)


# ---- errors and integration ----

WRONG_VALUES: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "guidance": (lambda a: set_value(a, "guidance", -INF), r"guidance\[2\] = -inf must be finite"),
    "nan guidance": (lambda a: set_value(a, "guidance", math.nan), r"guidance\[2\] = -?nan must be finite"),
    "temperature": (lambda a: set_value(a, "temperature", -0.5), r"temperature\[2\] = -0\.5 must be finite and >= 0"),
    "infinite temperature": (lambda a: set_value(a, "temperature", INF), r"temperature\[2\] = inf must be finite"),
    "nan temperature": (lambda a: set_value(a, "temperature", math.nan), r"temperature\[2\] = -?nan must be finite"),
    "top_p 0": (lambda a: set_value(a, "top_p", 0.0), r"top_p\[2\] = 0 must be in \(0, 1\]"),
    "top_p 1.5": (lambda a: set_value(a, "top_p", 1.5), r"top_p\[2\] = 1\.5 must be in \(0, 1\]"),
    "top_p nan": (lambda a: set_value(a, "top_p", math.nan), r"top_p\[2\] = -?nan must be in \(0, 1\]"),
    "top_k": (lambda a: set_value(a, "top_k", -1), r"top_k\[2\] = -1 must be >= 0"),
}

WRONG_ROWS = {"conditional_row": (-(2**31), -1, 4, 2**31 - 1), "unconditional_row": (-(2**31), -2, 4, 2**31 - 1)}

WRONG_ARGUMENTS: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "shape": (lambda a: a._replace(seed=a.seed[:2].clone()), r"seed must have shape \[M\] = \[3\], got \[2\]"),
    "dimensions": (lambda a: a._replace(logits=a.logits[0]), r"logits must have shape \[Q, V\]"),
    "dtype": (lambda a: a._replace(top_k=a.top_k.long()), r"top_k must be int32, got int64"),
    "float64": (lambda a: a._replace(logits=a.logits.double()), r"logits must be float32, bfloat16 or float16"),
    "columns apart": (
        lambda a: a._replace(logits=a.logits.repeat(1, 2)[:, ::2]),
        r"logits must be contiguous in its last",
    ),
    "no vocabulary": (lambda a: a._replace(logits=a.logits[:, :0]), r"logits: V must be in \[1, 2\^24\], got 0"),
}

NOTHING_TO_DRAW: dict[str, Callable[[Arguments], Arguments]] = {
    "nan logits": lambda a: set_logit(a, math.nan),
    "nan by mixing": lambda a: set_logit(a, -INF, row=3),
    "masked throughout": lambda a: set_row(a, -INF),
    "greedy nan": lambda a: set_logit(a._replace(temperature=torch.zeros(3)), math.nan),
}


def set_value(args: Arguments, name: str, value: float) -> Arguments:
    changed = getattr(args, name).clone()
    changed[2] = value
    return args._replace(**{name: changed})


def set_logit(args: Arguments, value: float, row: int = 1) -> Arguments:
    logits = args.logits.clone()
    logits[row, 20] = value
    return args._replace(logits=logits)


def set_row(args: Arguments, value: float) -> Arguments:
    logits = args.logits.clone()
    logits[1] = value
    return args._replace(logits=logits)


def example() -> Arguments:
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(1))
    return arguments(
        logits, 3, conditional=[0, 1, 2], unconditional=[-1, 3, 3], guidance=2.0, top_k=[0, 5, 9], top_p=[1.0, 0.9, 0.5]
    )


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_errors_name_the_argument(name: str, backend: torch.device) -> None:
    spoil, message = WRONG_ARGUMENTS[name]
    with pytest.raises(RuntimeError, match=message):
        spoil(example()).draw(backend)


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_errors_name_argument_and_value(name: str, backend: torch.device, on_cuda_kernels: bool) -> None:
    """An error on the CPU; CUDA kernels say -1 and draw the other tokens."""
    spoil, message = WRONG_VALUES[name]
    if on_cuda_kernels:
        assert spoil(example()).draw(backend).tolist() == [*example().draw(backend)[:2].tolist(), -1]
    else:
        with pytest.raises(RuntimeError, match=message):
            spoil(example()).draw(backend)
    assert_follows_tree(example().draw(backend), example(), example().probabilities())


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in WRONG_ROWS.items() for row in rows])
def test_rows_that_the_logits_have_not(name: str, row: int, backend: torch.device, on_cuda_kernels: bool) -> None:
    """An error on the CPU; CUDA kernels say -1 without reading outside, and draw the other tokens."""
    args = set_value(example(), name, row)
    if on_cuda_kernels:
        assert args.draw(backend).tolist() == [*example().draw(backend)[:2].tolist(), -1]
    else:
        allowed = r"\[0, 4\)" if name == "conditional_row" else r"\[-1, 4\)"
        with pytest.raises(RuntimeError, match=rf"{name}\[2\] = {row} must be in {allowed}"):
            args.draw(backend)


def test_logits_without_rows(backend: torch.device, on_cuda_kernels: bool) -> None:
    args = example()._replace(logits=torch.zeros(0, 37))
    if on_cuda_kernels:
        assert args.draw(backend).tolist() == [-1, -1, -1]
    else:
        with pytest.raises(RuntimeError, match=r"conditional_row\[0\] = 0 must be in \[0, 0\)"):
            args.draw(backend)


@pytest.mark.parametrize("name", NOTHING_TO_DRAW)
def test_rows_of_which_nothing_can_be_drawn(name: str, backend: torch.device, on_cuda_kernels: bool) -> None:
    """An error on the CPU; CUDA kernels, for which raising would mean waiting, say -1 and draw the other tokens."""
    args = NOTHING_TO_DRAW[name](example())
    if on_cuda_kernels:
        kept = args.take(torch.tensor([0, 2]))
        assert args.draw(backend).tolist() == [kept.draw(backend)[0], -1, kept.draw(backend)[1]]
    else:
        with pytest.raises(RuntimeError, match=r"logits of token 1 \(row 1\) contain NaN or are -inf throughout"):
            args.draw(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, backend: torch.device) -> None:
    args = example()._replace(logits=example().logits.to(dtype)).on(backend)
    torch.library.opcheck(ops._ops.sample_tokens.default, tuple(args))
    torch.library.opcheck(ops._ops.sample_tokens.default, tuple(args._replace(top_k=None, top_p=None)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own imports
def test_compiles_without_a_graph_break(backend: torch.device) -> None:
    args = example().on(backend)
    compiled = torch.compile(ops.sample_tokens, fullgraph=True)
    assert compiled(*args).equal(ops.sample_tokens(*args))
