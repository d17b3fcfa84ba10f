// The functions that launch the ops' kernels. Each takes the params struct that its front door has filled and checked,
// launches on `stream`, and returns without waiting. `workspace` is memory for intermediate results that the front door
// allocates, workspace_bytes(op) bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "../ops.h"

namespace entmaxkv::cuda {

int64_t workspace_bytes(const SelectGaussian& op);
int64_t workspace_bytes(const SelectPages& op);
int64_t workspace_bytes(const SelectSketch& op);
int64_t workspace_bytes(const SparseDecode& op);

void append_kv(const AppendKv& op, cudaStream_t stream);
void build_sketch(const BuildSketch& op, cudaStream_t stream);
void page_stats(const PageStats& op, cudaStream_t stream);
void score_gaussian(const ScoreGaussian& op, cudaStream_t stream);
void score_pages(const ScorePages& op, cudaStream_t stream);
void select_gaussian(const SelectGaussian& op, void* workspace, cudaStream_t stream);
void select_pages(const SelectPages& op, void* workspace, cudaStream_t stream);
void select_sketch(const SelectSketch& op, void* workspace, cudaStream_t stream);
void sparse_decode(const SparseDecode& op, void* workspace, cudaStream_t stream);

/// Writes the sketch of the keys that an append is going to add. append_kv calls this first.
void sketch_new_keys(const AppendKv& op, cudaStream_t stream);

}  // namespace entmaxkv::cuda
