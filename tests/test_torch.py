"""The ops as torch sees them: schemas, fake kernels, torch.compile."""

import inspect

import pytest
import torch
from conftest import assert_same_bits, draw, make_alphas, make_cache, make_query, make_slopes, tensors_in

import entmaxkv

OPS = torch.ops.entmaxkv

SCHEMAS = {
    "append_kv": "(Tensor k, Tensor v, Tensor? lengths, Tensor(a!) k_pages, Tensor(b!) v_pages, "
    "Tensor(c!)? k_min, Tensor(d!)? k_max, Tensor(e!)? k_mean, Tensor(f!)? k_std, Tensor "
    "page_table, Tensor(g!) seq_lens, Tensor(h!)? codes=None, Tensor(i!)? norms=None) -> ()",
    "build_sketch": "(Tensor k_pages, Tensor page_table, Tensor seq_lens, Tensor(a!) codes, Tensor(b!) norms) -> ()",
    "page_stats": "(Tensor k_pages, Tensor page_table, Tensor seq_lens, Tensor(a!)? k_min, Tensor(b!)? "
    "k_max, Tensor(c!)? k_mean, Tensor(d!)? k_std) -> ()",
    "score_pages": "(Tensor q, Tensor k_min, Tensor k_max, Tensor page_table, Tensor seq_lens, int "
    "page_size, float? scale=None, Tensor? alibi_slopes=None, float lower=0.) -> Tensor",
    "score_gaussian": "(Tensor q, Tensor k_mean, Tensor k_std, Tensor page_table, Tensor seq_lens, int "
    "page_size, float? scale=None, Tensor? alibi_slopes=None) -> (Tensor mean, Tensor std)",
    "select_pages": "(Tensor scores, Tensor seq_lens, int kv_heads, int page_size, int budget) -> (Tensor "
    "selected, Tensor counts)",
    "select_gaussian": "(Tensor mean, Tensor std, Tensor seq_lens, int kv_heads, int page_size, float "
    "alpha=1.5, float quantile=0.99, float margin=0., Tensor? head_alpha=None) -> (Tensor "
    "selected, Tensor counts)",
    "select_sketch": "(Tensor q, Tensor k_pages, Tensor codes, Tensor norms, Tensor page_table, Tensor seq_lens, "
    "float alpha=1.5, float? scale=None, Tensor? alibi_slopes=None, Tensor? head_alpha=None, int bits=4, float "
    "certainty=1., int? max_tokens=None) -> (Tensor selected, Tensor counts, Tensor delta_bound)",
    "sparse_decode": "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, Tensor"
    " selected, Tensor counts, float alpha=1.5, float? scale=None, Tensor? "
    "alibi_slopes=None, Tensor? head_alpha=None, bool by_token=False) -> (Tensor out, Tensor tau, Tensor "
    "support, Tensor tokens)",
    "dense_decode": "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, float "
    "alpha=1.5, float? scale=None, Tensor? alibi_slopes=None, Tensor? head_alpha=None) -> "
    "(Tensor out, Tensor tau, Tensor support, Tensor tokens)",
    "constants": "() -> (int max_head_dim, int min_page_size, int max_page_size, int sketch_block, "
    "int sketch_block_bytes, int exact_scores, float softmax_gap, float rank_lower)",
    "decode": "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor k_min, Tensor k_max, Tensor "
    "page_table, Tensor seq_lens, int budget, float alpha=1.5, float? scale=None, Tensor? "
    "alibi_slopes=None, Tensor? head_alpha=None) -> Tensor",
}
names = pytest.mark.parametrize("name", SCHEMAS)


@names
def test_schema(name):
    assert getattr(OPS, name).default._schema == torch._C.parse_schema(f"entmaxkv::{name}{SCHEMAS[name]}")


@names
def test_wrapper_is_typed_and_documented(name):
    wrapper = getattr(entmaxkv.ops, name)
    arguments = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    parameters = inspect.signature(wrapper).parameters
    assert list(parameters) == arguments
    assert all(parameter.annotation is not parameter.empty for parameter in parameters.values())
    assert all(argument in wrapper.__doc__ for argument in arguments)


def samples(device: str, dtype: torch.dtype) -> dict[str, list[tuple]]:
    """Arguments for every op, with and without the optional ones."""
    cache = make_cache([0, 1, 16, 100], dtype=dtype, device=device)
    for x in cache.tensors[:6]:
        x.nan_to_num_()
    q, slopes, alphas = make_query(4, 8, 64, dtype, device), make_slopes(8, device), make_alphas(8, device)
    k, v = (
        draw(4, 3, 2, 64, dtype=dtype, device=device),
        draw(4, 3, 2, 64, dtype=dtype, device=device, seed=1),
    )
    pool, table, page = (cache.k_pages, cache.v_pages), (cache.page_table, cache.seq_lens), cache.page_size
    bounds, moments = cache.statistics[:2], cache.statistics[2:]
    scores = OPS.score_pages(q, *bounds, *table, page)
    gaussian = OPS.score_gaussian(q, *moments, *table, page)
    chosen = OPS.select_pages(scores, cache.seq_lens, 2, page, 64)
    sketch = cache.sketch()
    tokens = OPS.select_sketch(q, pool[0], *sketch, *table)[:2]
    lengths = torch.tensor([3, 0, 1, 2], dtype=torch.int32, device=device)
    none = (None,) * 4
    return {
        "constants": [()],
        "append_kv": [(k, v, None, *cache.tensors), (k, v, lengths, *pool, *none, *table, *sketch)],
        "build_sketch": [(pool[0], *table, *sketch)],
        "page_stats": [(pool[0], *table, *cache.statistics), (pool[0], *table, *bounds, None, None)],
        "score_pages": [(q, *bounds, *table, page), (q, *bounds, *table, page, 0.3, slopes, 0.25)],
        "score_gaussian": [(q, *moments, *table, page), (q, *moments, *table, page, 0.3, slopes)],
        "select_pages": [(scores, cache.seq_lens, 2, page, 1), (scores, cache.seq_lens, 2, page, 10**6)],
        "select_gaussian": [
            (*gaussian, cache.seq_lens, 2, page),
            (*gaussian, cache.seq_lens, 2, page, 1.5, 0.9, 0.1, alphas),
        ],
        "select_sketch": [
            (q, pool[0], *sketch, *table),
            (q, pool[0], *sketch, *table, 2.0, 0.3, slopes, alphas, 2, 0.9, 40),
        ],
        "sparse_decode": [
            (q, *pool, *table, *chosen),
            (q, *pool, *table, *chosen, 2.0, 0.3, slopes, alphas),
            (q, *pool, *table, *tokens, 1.5, None, None, None, True),
        ],
        "dense_decode": [(q, *pool, *table), (q, *pool, *table, 1.0, 0.3, slopes, alphas)],
        "decode": [
            (q, *pool, *bounds, *table, 48),
            (q, *pool, *bounds, *table, 10**6, 2.0, 0.3, slopes, alphas),
        ],
    }


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(name, device, dtype):
    for arguments in samples(device, dtype)[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@names
def test_fake_kernel_runs_without_data(name, device):
    for arguments in samples(device, torch.float32)[name]:
        want = getattr(OPS, name)(*arguments)
        got = getattr(OPS, name)(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
        for x, y in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
            if not isinstance(y, torch.Tensor):  # an op without results, or of numbers alone
                assert x == y
                continue
            assert x.device.type == "meta" and (x.shape, x.dtype) == (y.shape, y.dtype)


every_selector = pytest.mark.parametrize(
    "select",
    [
        None,
        entmaxkv.TopPages(budget=48, dense_below=0),
        entmaxkv.Gaussian(dense_below=0),
        entmaxkv.KeySketch(dense_below=0),
        entmaxkv.KeySketch(certainty=1 - 1e-9, max_tokens=30, dense_below=0),
    ],
    ids=["dense", "top pages", "gaussian", "key sketch", "almost certain"],
)


@every_selector
def test_compiled_step_equals_eager(device, select):
    def step(q, k, v, cache):
        cache.append(k, v)
        out, info = entmaxkv.decode(q * 2, cache, alpha=1.5, select=select, return_info=True)
        return out + 1, info.support, info.certified

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        cache = entmaxkv.PagedKVCache(2, 128, 2, 64, device=device)
        cache.k_std.zero_()
        cache.append(draw(2, 90, 2, 64, device=device), draw(2, 90, 2, 64, device=device, seed=1))
        for token in range(3):
            q = make_query(2, 8, 64, device=device, seed=token)
            k, v = (
                draw(2, 1, 2, 64, device=device, seed=10 + token),
                draw(2, 1, 2, 64, device=device, seed=20 + token),
            )
            results.append((*run(q, k, v, cache), cache.seq_lens.clone(), cache.k_std.clone()))
    for got, want in zip(results[3:], results[:3], strict=True):
        assert_same_bits(got, want)


def test_compiled_op_equals_eager(device):
    arguments = samples(device, torch.float32)["decode"][1]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: OPS.decode(*a), fullgraph=True)
    assert_same_bits([compiled(*arguments)], [OPS.decode(*arguments)])


@every_selector
def test_compiled_step_takes_any_alpha(device, select):
    """A number that changes between calls is compiled once as a constant and once for all others."""
    cache = entmaxkv.PagedKVCache(2, 128, 2, 64, device=device)
    cache.append(draw(2, 90, 2, 64, device=device), draw(2, 90, 2, 64, device=device, seed=1))
    q = make_query(2, 8, 64, device=device)
    compilations = 0

    def backend(module, inputs):
        nonlocal compilations
        compilations += 1
        return module.forward  # test_compiled_step_equals_eager generates code

    def step(q, alpha):
        out, info = entmaxkv.decode(q, cache, alpha=alpha, select=select, return_info=True)
        return out, info

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for alpha in (1.5, 1.25, 1.1, 2, 1.0, 4 / 3, 1.75, 1.6, 1.7, 1.8, 1.9):
        rounded = torch.full((8,), alpha, dtype=torch.float32, device=device)
        want = step(q, alpha if alpha == 1.5 else rounded)
        assert_same_bits(tensors_in(compiled(q, alpha)), tensors_in(want))
    assert compilations <= 3  # 2 is an int


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16, "meta"], ids=str)
def test_results_do_not_follow_the_defaults(default):
    """Neither torch's default dtype nor its default device."""

    def results():
        cache = entmaxkv.PagedKVCache(2, 128, 2, 64, minmax=False, device="cpu")
        cache.append(k, v, [80, 40])
        cache.keep(minmax=True)
        cache.truncate([70, 90])
        cache.reorder([1, 0, 1])
        found = [cache.seq_lens, cache.page_table]
        for select in selectors:
            out, info = entmaxkv.decode(q, cache, select=select, return_info=True)
            measured = vars(entmaxkv.metrics.measure(q, cache, select=select))
            found += [out, *tensors_in(info), *(x for x in measured.values() if isinstance(x, torch.Tensor))]
        return found

    k, v, q = draw(2, 80, 2, 64), draw(2, 80, 2, 64, seed=1), make_query(3, 8, 64)
    selectors = [None, entmaxkv.TopPages(48), entmaxkv.Gaussian(), entmaxkv.KeySketch()]
    selectors += [entmaxkv.KeySketch(certainty=0.9), entmaxkv.KeySketch(max_tokens=16)]
    want = results()
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        got = results()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert_same_bits(got, want)
    assert all(x.device.type == "cpu" for x in got)


DERIVED = ["append_kv", "build_sketch", "page_stats", "score_pages", "score_gaussian"]
DERIVED += ["select_sketch", "sparse_decode", "dense_decode", "decode"]
derived = pytest.mark.parametrize("name", DERIVED)


def float_inputs(name: str, arguments: tuple) -> list[int]:
    """Places of the arguments that an op derives its results from."""
    of_cache = {"k_min", "k_max", "k_mean", "k_std"} if name == "page_stats" else set()
    names = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    floats = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [i for i in floats if names[i] not in of_cache]


@derived
def test_a_tangent_is_never_lost(name, device):
    """Forward-mode differentiation raises, before anything is written, as if the results had a tangent of zeros."""
    for arguments in samples(device, torch.float32)[name]:
        before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
        for place in float_inputs(name, arguments):

            def run(x, arguments=arguments, place=place):
                return getattr(OPS, name)(*arguments[:place], x, *arguments[place + 1 :])

            primal = arguments[place]
            with pytest.raises(NotImplementedError, match=f"entmaxkv::{name}: expected tensors without tangents"):
                torch.func.jvp(run, (primal,), (torch.ones_like(primal),))
            with (
                torch.autograd.forward_ad.dual_level(),
                pytest.raises(NotImplementedError, match="expected tensors without tangents, got a dual tensor"),
                torch.no_grad(),
            ):
                run(torch.autograd.forward_ad.make_dual(primal, torch.ones_like(primal)))
        assert_same_bits([x for x in arguments if isinstance(x, torch.Tensor)], before)
        with torch.autograd.forward_ad.dual_level():
            getattr(OPS, name)(*arguments)


@derived
def test_a_gradient_is_never_lost(name, device):
    """Ops that write raise where gradients are recorded; results of the others can be used, but not differentiated."""
    writes = name in ("append_kv", "build_sketch", "page_stats")
    for arguments in samples(device, torch.float32)[name]:
        before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
        for place in float_inputs(name, arguments):
            leaf = arguments[place].clone().requires_grad_()
            for x in (leaf, leaf * 1):

                def run(x, arguments=arguments, place=place):
                    return getattr(OPS, name)(*arguments[:place], x, *arguments[place + 1 :])

                if writes:
                    argument = getattr(OPS, name).default._schema.arguments[place].name
                    with pytest.raises(RuntimeError, match=f"entmaxkv::{name}: {argument}: expected .* no gradient"):
                        run(x)
                    continue
                results = [y for y in torch.utils._pytree.tree_leaves(run(x)) if y.is_floating_point()]
                assert all(y.requires_grad for y in results)
                with pytest.raises(NotImplementedError, match="decoding has no gradient, got backward through it"):
                    sum(y.nan_to_num(0, 0, 0).sum() for y in results).backward()
                with pytest.raises(NotImplementedError, match="decoding has no gradient"):
                    torch.func.vjp(run, arguments[place])
        assert_same_bits([x for x in arguments if isinstance(x, torch.Tensor)], before)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                place = float_inputs(name, arguments)[0]
                getattr(OPS, name)(*arguments[:place], arguments[place].requires_grad_(), *arguments[place + 1 :])
            arguments[place].requires_grad_(False)


def test_vmap_gives_what_a_loop_gives(device):
    """Op by op for each element; an op that writes to a cache cannot be mapped and says so."""
    cache = make_cache([0, 40, 100], device=device)
    q = make_query(3, 4, 64, device=device)
    queries = torch.stack([q, 2 * q, -q])
    pool = cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens
    got = torch.func.vmap(lambda x: OPS.dense_decode(x, *pool))(queries)
    want = [torch.stack(x) for x in zip(*(OPS.dense_decode(x, *pool) for x in queries), strict=True)]
    assert_same_bits(got, want)
    k, before = draw(2, 3, 1, 2, 64, device=device), cache.clone()
    with pytest.raises(RuntimeError, match="entmaxkv::append_kv"):
        torch.func.vmap(lambda x: (cache.append(x, x), x)[1])(k)
    assert_same_bits(cache.tensors, before.tensors)
