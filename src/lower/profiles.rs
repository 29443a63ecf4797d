//! Which shapes an engine is built for: prefill and decode for a network with caches, any batch for one without.
use super::attention::cache_names;
use crate::engine_dir::Sizes;
use graphs::{Axis, Dim, Network};
use tensorrt_sys::ShapeRange;

/// With exactly one token TensorRT-RTX joins matrices that share an input for this profile alone, and the plan then holds
/// them twice (LLaMA-7B layers in float16: 658 MiB each instead of 391). A range keeps one copy for both profiles.
const DECODE_TOKENS: usize = 2;

/// Largest size of each named dimension.
fn limit(axis: Axis, sizes: &Sizes, decode: bool) -> usize {
    match axis {
        Axis::Batch => sizes.max_batch_size,
        Axis::Tokens if decode => DECODE_TOKENS,
        Axis::Tokens => sizes.max_input_len,
        Axis::Source => sizes.max_input_len,
        // A batch without pictures still brings one row.
        Axis::Features => sizes.max_prompt_embedding_table_size.max(1),
    }
}

/// One list of ranges per profile: prefill and decode where there is a cache. A range (1, (M + 1) / 2, M) is TensorRT-LLM's.
pub fn profiles(network: &Network, sizes: &Sizes) -> Vec<Vec<ShapeRange>> {
    let caches = network.caches();
    let kinds: &[bool] = match caches.is_empty() {
        true => &[false],
        // A decoder behind an encoder starts with one token.
        false if network.inputs().any(|node| node.path.starts_with("cross_key_")) => &[true],
        false => &[false, true],
    };
    kinds.iter().map(|&decode| profile(network, sizes, decode)).collect()
}

fn profile(network: &Network, sizes: &Sizes, decode: bool) -> Vec<ShapeRange> {
    let range = |input: String, shape: &[Dim]| {
        let pick = |choose: fn(usize) -> usize| {
            let size = |dim: &Dim| match *dim {
                Dim::Fixed(size) => size as i64,
                Dim::Named(axis) => choose(limit(axis, sizes, decode)) as i64,
            };
            shape.iter().map(size).collect::<Vec<i64>>()
        };
        ShapeRange { input, min: pick(|_| 1), opt: pick(|max| max.div_ceil(2)), max: pick(|max| max) }
    };
    let dynamic = |shape: &[Dim]| shape.iter().any(|dim| dim.fixed().is_none());
    let mut ranges: Vec<ShapeRange> = network
        .inputs()
        .filter(|node| dynamic(&node.ty.shape))
        .map(|node| range(node.path.clone(), &node.ty.shape))
        .collect();
    for cache in network.caches() {
        let row = cache.row_elements();
        let shape = [Axis::Batch.into(), cache.kv_heads.into(), sizes.max_seq_len.into(), row.into()];
        for kind in ["key", "value"] {
            let [input, _] = cache_names(kind, cache.slot);
            ranges.push(range(input, &shape));
        }
    }
    ranges
}
