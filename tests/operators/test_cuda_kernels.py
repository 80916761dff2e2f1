"""The CUDA kernels in the emulator under sanitizers: silent as they are, reported with a mistake planted in them.

Builds programs of tests/cuda_emulation/kernel_driver.cpp with the system's C++ compiler; needs neither torch nor CUDA.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from test_emulator import COMPILER, EMULATION, FLAGS, KERNELS, PROGRAMS, RUNTIME, compile_or_link

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

BENCH = KERNELS.parent / "bench"  # for operator_params.h
CUDA_SOURCES = {source.stem.removesuffix("_cuda"): source for source in sorted(KERNELS.glob("*/*_cuda.cu"))}
OTHER_SOURCES = (
    "common/cpu_dispatch.cpp",
    "common/dtype.cpp",
    "common/segment.cpp",
    "locality_order/proximity_table.cpp",
)
UNOPTIMISED = ["-O0", "-w"]  # kernels: compiled in a third of the time
FLAVOURS = ("plain", "address", "thread", "count")
# "stopped": by the emulator; "differs": outputs, between thread orders or from the CPU kernel's.
# "early": by the emulator too, which must hear of every access, not only of those of 8 and 16 bytes.
HOW_MUCH = {"plain": [], "address": ["once"], "thread": ["few"], "count": ["few"]}  # an argument of the driver
FLAVOUR_OF = {
    "stopped": "plain",
    "differs": "plain",
    "ASan": "address",
    "UBSan": "address",
    "TSan": "thread",
    "early": "count",
}


class Mistake(NamedTuple):
    """A planted mistake: `old`, which stands once in the CUDA sources, becomes `new`; `reporter` notices.

    Or once in a header that they share with the CPU's kernels, which keep theirs.
    """

    operator: str
    reporter: str
    old: str
    new: str


MISTAKES = {
    # group_attention, of which each takes long to compile
    "waits_for_one_copy_too_few": Mistake(
        "group_attention",
        "stopped",
        "ptx::cp_async_wait<Shape::kSlots - 2>();\n    __syncthreads();\n    copy_keys(",
        "ptx::cp_async_wait<Shape::kSlots - 1>();\n    __syncthreads();\n    copy_keys(",
    ),
    "asks_for_keys_of_the_launch_before": Mistake(
        "group_attention",
        "stopped",
        "if (!p.settled) ptx::follow_launch_before();  // which wrote Q, K and V",
        "ask_for_keys_of_next<T, kHeadDim>(p, splits.blocks_at_once, Layout::Shape::kKeys);\n"
        "  if (!p.settled) ptx::follow_launch_before();  // which wrote Q, K and V",
    ),
    "asks_for_keys_of_no_block": Mistake("group_attention", "ASan", " || next >= gridDim.x) return;", ") return;"),
    "no_barrier_after_work_is_made": Mistake("group_attention", "TSan", "__syncthreads();  // work is made", ""),
    "no_barrier_before_refill": Mistake(
        "group_attention", "TSan", "__syncthreads();\n    copy_keys(half_", "__syncwarp();\n    copy_keys(half_"
    ),
    "counter_not_reset": Mistake(
        "group_attention", "differs", "atomicInc(counter, blocks - 1)", "atomicAdd(counter, 1u)"
    ),
    "no_fence_before_arrival": Mistake(
        "group_attention", "TSan", "__threadfence();\n  __syncthreads();", "__syncthreads();"
    ),
    "no_barrier_before_partials": Mistake("group_attention", "TSan", "if (in_shared) __syncthreads();", ""),
    "reads_other_splits_keys": Mistake(
        "group_attention", "differs", "shared_keys = min(shared_keys, split_end);", "shared_keys += 0;"
    ),
    "pushes_to_blocks_that_may_not_run_yet": Mistake(
        "group_attention", "stopped", "ptx::cluster_wait();  // all blocks run, and their mbarriers are made", ""
    ),
    "pushes_before_all_partials_are_written": Mistake(
        "group_attention", "TSan", "__syncthreads();  // all partials are written", ""
    ),
    "pushes_to_the_next_block": Mistake(
        "group_attention", "stopped", "((row + 1) * work_.num_splits - 1) / rows;", "row * work_.num_splits / rows;"
    ),
    "expects_a_row_too_few": Mistake(
        "group_attention", "stopped", "finished * work_.num_splits * kPart", "(finished - 1) * work_.num_splits * kPart"
    ),
    "expects_no_statistics": Mistake(
        "group_attention",
        "stopped",
        "work_.num_splits * kPartElements<kHeadDim> * 4));",
        "work_.num_splits * kHeadDim * 4));",
    ),
    "does_not_wait_for_parts": Mistake("group_attention", "stopped", "ptx::mbarrier_wait(barrier_, 0);", ""),
    "receives_over_keys": Mistake(
        "group_attention",
        "differs",
        "reinterpret_cast<float*>(smem + Layout::kBytes)",
        "reinterpret_cast<float*>(smem + Layout::kFieldsOffset / 2)",
    ),
    "parts_of_one_block": Mistake(
        "group_attention",
        "differs",
        "const float* const from = received(row, rank);",
        "const float* const from = received(row, 0);",
    ),
    "query_rows_right_behind_context": Mistake(
        "group_attention", "differs", "tile_context_slabs() * kSlabRows + i - context_rows();", "i;"
    ),
    "rows_of_q_and_partials_at_once": Mistake(
        "group_attention", "stopped", "|| work.num_tiles == 0) ring.wait", ") ring.wait"
    ),
    "reads_rows_as_if_they_were_settled": Mistake(
        "group_attention", "stopped", "copy_keys(half, true, !p.settled);", "copy_keys(half, true, true);"
    ),
    "reads_caches_that_are_not_settled": Mistake(
        "group_attention",
        "stopped",
        "if (!p.settled) ptx::follow_launch_before();  // which wrote Q",
        "// which wrote Q",
    ),
    "attends_before_the_launch_before_has_ended": Mistake(
        "group_attention",
        "stopped",
        "if (p.settled) ptx::follow_launch_before();  // which wrote rows\n",
        "if (p.settled) ptx::let_launch_after_begin();\n",
    ),
    "leaves_without_waiting_where_nobody_attends": Mistake(
        "group_attention", "stopped", "if (p.settled) ptx::follow_launch_before();  // which wrote rows to append", ""
    ),
    "swizzle_on_one_side": Mistake(
        "group_attention",
        "differs",
        "arrived + Shape::at(row, chunk_)",
        "arrived + row * kHeadDim + chunk_ * Shape::kChunk",
    ),
    "copies_keys_that_do_not_exist": Mistake(
        "group_attention", "differs", "exists ? from : rows, exists", "exists ? from : rows"
    ),
    "sees_one_key_too_many": Mistake(
        "group_attention",
        "differs",
        "key < key_end_ && work_.key_exists(key)",
        "key <= key_end_ && work_.key_exists(key)",
    ),
    # append_kv
    "appends_one_row_too_many": Mistake(
        "append_kv", "differs", "segment.num_context));\n}", "segment.num_context + 1));\n}"
    ),
    "appends_without_waiting": Mistake(
        "append_kv", "stopped", "ptx::follow_launch_before();  // which wrote rows of K", "// which wrote rows of K"
    ),
    "appends_whole_blocks": Mistake(
        "append_kv", "ASan", "min(first + kBlockRows, segment.num_context)", "first + kBlockRows"
    ),
    "no_barrier_after_segment": Mistake(
        "append_kv", "TSan", "+ threadIdx.x];\n  }\n  __syncthreads();", "+ threadIdx.x];\n  }"
    ),
    "wrong_cache_stride": Mistake(
        "append_kv", "differs", "segment.cache_length * p.cache_position_stride)", "segment.cache_length * p.head_dim)"
    ),
    # embed_rows
    "no_barrier_after_offsets": Mistake(
        "embed_rows", "TSan", "int64_t{-1});\n  }\n  __syncthreads();", "int64_t{-1});\n  }"
    ),
    "rows_at_twice_their_stride": Mistake("embed_rows", "ASan", "index * stride :", "index * stride * 2 :"),
    "block_sum_without_barrier": Mistake("embed_rows", "TSan", "sums[i];\n  }\n  __syncthreads();", "sums[i];\n  }\n"),
    "embeds_without_waiting": Mistake(
        "embed_rows", "stopped", "ptx::follow_launch_before();  // which wrote contents", "// which wrote contents"
    ),
    "ids_before_the_launch_before_has_ended": Mistake(
        "embed_rows",
        "early",
        "ptx::follow_launch_before();  // which wrote contents",
        "const volatile int64_t id = p.content_ids[0];\n  ptx::follow_launch_before();",
    ),
    "statistics_of_16_columns": Mistake(
        "embed_rows", "differs", "lanes < kStatisticsColumns / kPerThread;", "lanes < kStatisticsColumns / 16;"
    ),
    "statistics_of_every_lane": Mistake(
        "embed_rows", "TSan", "if (column % kStatisticsColumns == 0 && slice.holds(0))", "if (slice.holds(0))"
    ),
    "scaled_before_it_is_normed": Mistake(
        "embed_rows",
        "differs",
        "scaled[k] *= values[k];",
        "scaled[k] = values[k];",
    ),
    "sums_of_one_warp_too_many": Mistake("embed_rows", "differs", "lane < warps ?", "lane <= warps ?"),
    # residual_layer_norm
    "two_sums_share_partials": Mistake(
        "residual_layer_norm", "TSan", "block_sum(sums, shared + kWarpSize)", "block_sum(sums, shared)"
    ),
    "norms_without_waiting": Mistake(
        "residual_layer_norm", "stopped", "ptx::follow_launch_before();  // which wrote x and", "// which wrote x and"
    ),
    "x_before_the_launch_before_has_ended": Mistake(
        "residual_layer_norm",
        "stopped",
        "ptx::follow_launch_before();  // which wrote x and delta\n  const auto loaded = slice.load(x);",
        "const auto loaded = slice.load(x);\n  ptx::follow_launch_before();",
    ),
    "row_end_off_by_one": Mistake(
        "residual_layer_norm", "ASan", "kPerThread * int(threadIdx.x) < width", "kPerThread * int(threadIdx.x) <= width"
    ),
    "statistics_of_what_is_outside": Mistake(
        "residual_layer_norm", "differs", "slice.holds(k) ? values[k] - mean : 0.0f", "values[k] - mean"
    ),
    "lanes_leave_before_shuffle": Mistake(
        "residual_layer_norm",
        "stopped",
        "const uint4 packed = swap_quads",
        "if (!holds(0)) return;\n      const uint4 packed = swap_quads",
    ),
    "one_element_too_many": Mistake(
        "residual_layer_norm",
        "UBSan",
        "k < kPerThread; ++k) values[k] += added[k];",
        "k <= kPerThread; ++k) values[k] += added[k];",
    ),
    "rows_without_stride": Mistake("residual_layer_norm", "differs", "row * p.delta_stride", "row * p.width"),
    # sample_tokens
    "no_syncwarp_before_draw": Mistake("sample_tokens", "TSan", "__syncwarp();\n    id = descend", "id = descend"),
    "draws_without_waiting": Mistake(
        "sample_tokens",
        "stopped",
        "ptx::follow_launch_before();  // which wrote the logits",
        "// which wrote the logits",
    ),
    "tables_before_the_launch_before_has_ended": Mistake(
        "sample_tokens",
        "early",
        "ptx::follow_launch_before();  // which wrote the logits\n",
        "if (threadIdx.x == 0) read_inputs(p, m, shared_inputs[0]);\n  ptx::follow_launch_before();\n",
    ),
    "leaves_a_wrong_row_without_waiting": Mistake(
        "sample_tokens",
        "stopped",
        "ptx::follow_launch_before();  // which wrote the logits",
        "if (p.conditional_row[m] < 0) return;\n  ptx::follow_launch_before();",
    ),
    "sums_without_barrier": Mistake(
        "sample_tokens",
        "TSan",
        "partial_sums[warp * 8 + lane] = mine;\n  __syncthreads();",
        "partial_sums[warp * 8 + lane] = mine;",
    ),
    "passes_share_sums": Mistake(
        "sample_tokens",
        "TSan",
        "cut(by_weight, target, expected, visit, exchange[turn])",
        "cut(by_weight, target, expected, visit, exchange[0])",
    ),
    "one_token_too_many": Mistake(
        "sample_tokens", "differs", "static_cast<float>(settings.top_k - 1)", "static_cast<float>(settings.top_k)"
    ),
    "threshold_excludes_itself": Mistake(
        "sample_tokens", "differs", "lane < kTailSums && sum > target", "lane < kTailSums && sum >= target"
    ),
    "reads_past_the_row": Mistake(
        "sample_tokens", "ASan", "id >= rows.vector_end && id < rows.vocab_size", "id >= rows.vector_end"
    ),
    # and what sample_step makes of it
    "guidance_of_another_token": Mistake(
        "sample_tokens", "differs", "(by_image ? tables.token_index[m] : 0)", "(by_image ? tables.token_index[0] : 0)"
    ),
    "seed_of_another_image": Mistake("sample_tokens", "differs", "p.seed[at * p.seed_stride]", "p.seed[m]"),
    "cell_in_drawing_order": Mistake(
        "sample_tokens", "differs", "tables.positions[tables.write_index[m]] - 1 :", "tables.token_index[m] :"
    ),
    "contents_of_another_row": Mistake(
        "sample_tokens",
        "differs",
        "tables.contents[tables.write_index[m]] = token;",
        "tables.contents[tables.write_index[m] + 1] = token;",
    ),
    "a_twin_that_is_not_there": Mistake("sample_tokens", "ASan", "if (tables.twin_index[m] >= 0) tables", "tables"),
    "grid_in_drawing_order": Mistake(
        "sample_tokens", "differs", "* tables.num_cells + settings.cell]", "* tables.num_cells + tables.token_index[m]]"
    ),
    "a_row_too_many": Mistake(
        "sample_tokens", "ASan", "within(conditional_row, 0, p.num_rows)", "within(conditional_row, 0, p.num_rows + 1)"
    ),
    "a_row_below_for_no_guidance": Mistake(
        "sample_tokens", "differs", "within(unconditional_row, -1, p.", "within(unconditional_row, -2, p."
    ),
    "an_image_too_many": Mistake(
        "sample_tokens",
        "ASan",
        "within(tables.image[m], 0, tables.num_images)",
        "within(tables.image[m], 0, tables.num_images + 1)",
    ),
    "a_position_of_no_cell": Mistake(
        "sample_tokens",
        "differs",
        "within(tables.positions[tables.write_index[m]], 1,",
        "within(tables.positions[tables.write_index[m]], 0,",
    ),
    # residual_linear and normed_linear, which share few_row_product.cuh
    "waits_for_rows_of_one_round_too_few": Mistake(
        "residual_linear",
        "stopped",
        "case 2: return ptx::cp_async_wait<1>();",
        "case 2: return ptx::cp_async_wait<2>();",
    ),
    "no_barrier_before_products": Mistake(
        "residual_linear", "TSan", "__syncthreads();  // what came", "__syncwarp();  // what came"
    ),
    "no_barrier_before_sums_are_added": Mistake(
        "residual_linear", "TSan", "      __syncthreads();\n      for (int i = warp_", "      for (int i = warp_"
    ),
    "pushes_to_blocks_that_may_not_run": Mistake(
        "residual_linear", "stopped", "if (tile == 0) ptx::cluster_wait();", ""
    ),
    "expects_one_unit_too_many": Mistake(
        "residual_linear", "stopped", "own * tile_.cluster * kUnitBytes", "(own + 1) * tile_.cluster * kUnitBytes"
    ),
    "expects_half_of_the_bytes": Mistake(
        "residual_linear", "stopped", "own * tile_.cluster * kUnitBytes", "own * tile_.cluster * kUnitBytes / 2"
    ),
    "does_not_wait_for_the_cluster": Mistake(
        "residual_linear",
        "stopped",
        "ptx::mbarrier_wait(barriers_ + tile % 2, static_cast<unsigned>(tile / 2 % 2));",
        "",
    ),
    "waits_for_the_phase_before": Mistake(
        "residual_linear", "stopped", "static_cast<unsigned>(tile / 2 % 2)", "static_cast<unsigned>(1 - tile / 2 % 2)"
    ),
    "mbarriers_not_shown": Mistake(
        "residual_linear",
        "stopped",
        "ptx::mbarrier_init(barriers_ + 1, 1);\n      ptx::fence_mbarrier_init();",
        "ptx::mbarrier_init(barriers_ + 1, 1);",
    ),
    "receives_over_the_rows": Mistake(
        "residual_linear", "differs", "shared + plan.received_begin", "shared + plan.rows_begin"
    ),
    "one_buffer_for_all_tiles": Mistake(
        "residual_linear", "TSan", "((tile % 2 * plan_.units + unit_of_block)", "((unit_of_block)"
    ),
    "sums_in_a_chain": Mistake(
        "residual_linear",
        "differs",
        "add(tree_sum<kCount / 2>(at, first), tree_sum<kCount / 2>(at, first + kCount / 2))",
        "add(tree_sum<kCount - 1>(at, first), at(first + kCount - 1))",
    ),
    "no_wait_for_the_launch_before": Mistake(
        "residual_linear", "stopped", "ptx::follow_launch_before();  // which wrote all but", "// which wrote all but"
    ),
    "rows_before_the_launch_before_has_ended": Mistake(
        "residual_linear",
        "stopped",
        "ptx::cp_async_commit();\n    ptx::follow_launch_before();",
        "load_rows(0);\n    ptx::cp_async_commit();\n    ptx::follow_launch_before();",
    ),
    "lets_the_launch_after_begin_too_early": Mistake(
        "normed_linear",
        "stopped",
        "ptx::cp_async_commit();\n    ptx::follow_launch_before();",
        "ptx::cp_async_commit();\n    ptx::let_launch_after_begin();\n    ptx::follow_launch_before();",
    ),
    "a_feature_of_another_row": Mistake("normed_linear", "differs", "4 * (lane_ % 8) + lane_ / 8 % 2", "lane_ % 16"),
    "swizzle_of_weights_on_one_side": Mistake(
        "normed_linear", "differs", "(chunk ^ (feature >> 2 & 7))", "(chunk ^ (feature & 7))"
    ),
    "streams_over_what_is_read": Mistake(
        "normed_linear", "differs", ": iteration % kRingRounds;", ": iteration % (kRingRounds - 1);"
    ),
    "statistics_of_features_that_exist": Mistake(
        "normed_linear", "differs", "at.row < p.num_rows ? groups : 0", "at.exists ? groups : 0"
    ),
    "features_past_the_end": Mistake(
        "normed_linear", "ASan", "if (first_feature_ + feature >= p_.num_features) break;", ""
    ),
    "deviation_of_32_columns": Mistake(
        "normed_linear", "differs", "squares += part.y + 32.0f * (", "squares += part.y + 0.0f * ("
    ),
    # fold_layer_norm
    "folds_gamma_twice": Mistake(
        "fold_layer_norm", "differs", "static_cast<const T*>(p.beta) + k", "static_cast<const T*>(p.gamma) + k"
    ),
    "folds_without_waiting": Mistake(
        "fold_layer_norm", "stopped", "ptx::follow_launch_before();  // which may use", "// which may use"
    ),
    "leaves_features_without_waiting": Mistake(
        "fold_layer_norm",
        "stopped",
        "const bool exists = feature < p.num_features;",
        "if (feature >= p.num_features) return;\n  const bool exists = true;",
    ),
    "writes_a_slope_before_it_waits": Mistake(
        "fold_layer_norm",
        "early",
        "ptx::follow_launch_before();  // which may use",
        "if (exists) p.slope[feature] = slope;\n  ptx::follow_launch_before();  // which may use",
    ),
    "folds_past_the_row": Mistake("fold_layer_norm", "ASan", "exists && k < p.depth", "exists && k <= p.depth"),
    "a_feature_too_many": Mistake(
        "fold_layer_norm", "ASan", "exists = feature < p.num_features", "exists = feature <= p.num_features"
    ),
    # locality_order
    "no_barrier_before_drawn": Mistake(
        "locality_order", "TSan", "__syncthreads();  // order_ is written", "// order_ is written"
    ),
    "orders_without_waiting": Mistake(
        "locality_order", "stopped", "ptx::follow_launch_before();  // which may have", "// which may have"
    ),
    "one_set_of_picks": Mistake("locality_order", "TSan", "which_picks_ ^= 1;", ""),
    "no_barrier_in_best": Mistake(
        "locality_order",
        "TSan",
        "uint2{mine.score, mine.cell});\n    __syncthreads();",
        "uint2{mine.score, mine.cell});",
    ),
    "refuses_one_row_too_few": Mistake(
        "locality_order",
        "differs",
        "<= 2u * reach;\n      const bool in_columns",
        "< 2u * reach;\n      const bool in_columns",
    ),
    "wraps_at_the_edge": Mistake("locality_order", "differs", "7 - (column == 0)", "7"),
    "scores_overlap_drawn": Mistake(
        "locality_order", "differs", "drawn_ = scores_ + (num_cells_ + 3) / 4 * 4;", "drawn_ = scores_ + num_cells_;"
    ),
}


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LPD_CPU_ISA": "scalar",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def who_reports(program: Path, operator: str, flavour: str) -> tuple[str | None, str]:
    """Who has something to say about the kernels of an operator, and what."""
    done = run(program, operator, *HOW_MUCH[flavour])
    # Whole headings: "FATAL: ThreadSanitizer: unexpected memory mapping" says that it could not start.
    headings = {"ERROR: AddressSanitizer": "ASan", "runtime error:": "UBSan", "WARNING: ThreadSanitizer": "TSan"}
    for heading, name in headings.items():
        if heading in done.stderr:
            return name, done.stderr
    stopped = "early" if flavour == "count" else "stopped"
    return {0: None, 1: "differs", 86: stopped}.get(done.returncode, f"exit status {done.returncode}"), done.stderr


class Programs:
    """A program of all operators per flavour, and variants with a mistake in one operator."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.folder = folder
        cpu_sources = [KERNELS / "common/cpu_table.cpp", *KERNELS.glob("*/*_cpu.cpp")]
        cpu_sources += [KERNELS / name for name in OTHER_SOURCES]
        units = {("cpu", source.stem): (source, ["-DLPD_ISA=scalar", "-DLPD_ISA_SCALAR"]) for source in cpu_sources}
        for flavour in FLAVOURS:
            kernel_flags, runtime_flags, _, _ = PROGRAMS[flavour]
            units |= {(flavour, name): (source, [*UNOPTIMISED, *kernel_flags]) for name, source in CUDA_SOURCES.items()}
            for name in (*RUNTIME, "kernel_driver", *(["emulator_hooks"] if flavour == "count" else [])):
                units[flavour, name] = (EMULATION / f"{name}.cpp", [*runtime_flags, f"-I{BENCH}"])
        slow_first = sorted(units, key=lambda unit: (unit[0] != "address", unit[1] != "group_attention"))
        compiled = pool.map(lambda unit: self.compile("_".join(unit), *units[unit]), slow_first)
        self.objects = dict(zip(slow_first, compiled, strict=True))
        self.clean = dict(zip(FLAVOURS, pool.map(lambda flavour: self.link(flavour, flavour), FLAVOURS), strict=True))

    def compile(self, name: str, source: Path, flags: list[str], first_flags: Sequence[str] = ()) -> Path:
        out = self.folder / f"{name}.o"
        compile_or_link(*first_flags, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(out))
        return out

    def link(self, name: str, flavour: str, **other: Path) -> Path:
        """Links a program of a flavour, with other objects for those of these names."""
        objects = {unit: file for (of, unit), file in self.objects.items() if of in (flavour, "cpu")} | other
        out = self.folder / name
        compile_or_link(*PROGRAMS[flavour][2], "-pthread", *map(str, objects.values()), "-o", str(out))
        return out

    def with_mistake(self, name: str, mistake: Mistake) -> Path:
        """Builds the one flavour whose reporter is to notice."""
        sources = [source for source in KERNELS.glob("*/*.cu*") if mistake.old in source.read_text()]
        sources = sources or [source for source in KERNELS.glob("*/*.h") if mistake.old in source.read_text()]
        count = sum(source.read_text().count(mistake.old) for source in sources)
        assert count == 1, f"{name} must be planted anew: its text stands {count} times in the CUDA sources"
        overlay = self.folder / f"{name}_sources"
        planted = overlay / sources[0].relative_to(KERNELS)
        planted.parent.mkdir(parents=True)
        planted.write_text(sources[0].read_text().replace(mistake.old, mistake.new))
        source = CUDA_SOURCES[mistake.operator]
        flavour = FLAVOUR_OF[mistake.reporter]
        flags = [*UNOPTIMISED, *PROGRAMS[flavour][0]]
        file = self.compile(name, planted if source == sources[0] else source, flags, [f"-I{overlay}"])
        return self.link(name, flavour, **{mistake.operator: file})


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield threads


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, pool: ThreadPoolExecutor) -> Programs:
    return Programs(tmp_path_factory.mktemp("kernels"), pool)


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, programs: Programs, pool: ThreadPoolExecutor
) -> dict[str, Future[tuple[str | None, str]]]:
    """Reports on the mistakes whose tests are selected."""
    selected = {item.name for item in request.session.items}

    def report(name: str, mistake: Mistake) -> tuple[str | None, str]:
        program = programs.with_mistake(name, mistake)
        return who_reports(program, mistake.operator, FLAVOUR_OF[mistake.reporter])

    return {
        name: pool.submit(report, name, mistake)
        for name, mistake in MISTAKES.items()
        if f"{test_mistake_is_reported.__name__}[{name}]" in selected
    }


@pytest.mark.parametrize("operator", CUDA_SOURCES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_kernels_are_clean(programs: Programs, flavour: str, operator: str) -> None:
    assert who_reports(programs.clean[flavour], operator, flavour) == (None, "")


def test_an_unknown_dtype_is_named(programs: Programs) -> None:
    assert who_reports(programs.clean["plain"], "unknown_dtype", "plain") == (None, "")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported(reports: dict[str, Future[tuple[str | None, str]]], name: str) -> None:
    reporter, text = reports[name].result()
    assert reporter == MISTAKES[name].reporter, text


def test_every_operator_has_mistakes() -> None:
    for operator in CUDA_SOURCES:
        assert sum(mistake.operator == operator for mistake in MISTAKES.values()) >= 2
