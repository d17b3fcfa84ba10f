// The CPU kernels: one function per op. Its front door has filled and checked the params struct (ops.h).
#pragma once

#include "../ops.h"

namespace entmaxkv::cpu {

void append_kv(const AppendKv& op);
void build_sketch(const BuildSketch& op);
void page_stats(const PageStats& op);
void score_gaussian(const ScoreGaussian& op);
void score_pages(const ScorePages& op);
void select_gaussian(const SelectGaussian& op);
void select_pages(const SelectPages& op);
void select_sketch(const SelectSketch& op);
void sparse_decode(const SparseDecode& op);

}  // namespace entmaxkv::cpu
