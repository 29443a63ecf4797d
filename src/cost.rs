//! What a network must do at least: arithmetic, and bytes that have to be read from memory once.
use graphs::{Axis, Dim, Format, Mask, Network, Op, Weight};
use std::collections::BTreeSet;

/// Sizes of the named dimensions of one call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub batch: usize,
    /// New tokens of each request.
    pub tokens: usize,
    /// Tokens of each request that lie in the caches.
    pub past: usize,
    /// Tokens that an encoder reads of each request.
    pub source: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiplications and additions of matrix products, convolutions and attention.
    pub operations: f64,
    /// Bytes of weights that are read whole: all but tables of which only rows are looked up.
    pub weight_bytes: f64,
    /// Bytes of keys and values that attention reads.
    pub cache_bytes: f64,
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), |sum, cost| Cost {
            operations: sum.operations + cost.operations,
            weight_bytes: sum.weight_bytes + cost.weight_bytes,
            cache_bytes: sum.cache_bytes + cost.cache_bytes,
        })
    }
}

/// The cost of one call.
pub fn cost(network: &Network, call: Call) -> Cost {
    let size = |dim: &Dim| match *dim {
        Dim::Fixed(size) => size,
        Dim::Named(Axis::Batch) => call.batch,
        Dim::Named(Axis::Tokens) => call.tokens,
        Dim::Named(Axis::Source) => call.source,
        Dim::Named(Axis::Features) => 0,
    };
    let element = network.dtype.bytes(1) as f64;
    let (mut cost, mut seen) = (Cost::default(), BTreeSet::new());
    for node in &network.nodes {
        let outputs: f64 = node.ty.shape.iter().map(|dim| size(dim) as f64).product();
        match &node.op {
            Op::Linear { weight, .. } | Op::Conv { weight, .. } => {
                let inputs: usize = weight.shape().iter().skip(1).product();
                cost.operations += 2.0 * outputs * inputs as f64;
            }
            Op::Attention(attention) => {
                // A network without a cache has all its tokens in the shape.
                let new = node.ty.shape.get(1).map_or(call.tokens, size) as f64;
                let past = if attention.cache.is_some() { call.past as f64 } else { 0.0 };
                let read = node.inputs.get(1).and_then(|key| network.nodes.get(key.0));
                let keys = read.and_then(|key| key.ty.shape.get(1)).map_or(new, |dim| size(dim) as f64);
                let pairs = match (attention.cache.is_some(), attention.mask) {
                    (true, Mask::Causal) => new * past + new * (new + 1.0) / 2.0,
                    (false, Mask::Causal) => new * (new + 1.0) / 2.0,
                    (true, _) => new * new,
                    (false, _) => new * keys,
                };
                let width = (attention.heads * attention.head_dim) as f64;
                cost.operations += 4.0 * call.batch as f64 * width * pairs;
                let row = 2.0 * (attention.kv_heads * attention.head_dim) as f64 * element;
                if let Some(cache) = attention.kept() {
                    cost.cache_bytes += call.batch as f64 * (past + new) * cache.token_bytes(network.dtype) as f64;
                } else if read.is_some_and(|key| key.op == Op::Input) {
                    // Keys and values that another network made, once for all steps.
                    cost.cache_bytes += call.batch as f64 * keys * row;
                }
            }
            _ => {}
        }
        if matches!(node.op, Op::Embed { .. }) {
            continue;
        }
        for weight in node.op.weights() {
            if seen.insert(weight.key()) {
                cost.weight_bytes += stored_bytes(weight, element);
            }
        }
    }
    cost
}

/// Bytes of a weight as an engine reads it, scales included.
fn stored_bytes(weight: &Weight, element: f64) -> f64 {
    let count = weight.count() as f64;
    let outputs = weight.shape().first().copied().unwrap_or(1) as f64;
    match weight.format() {
        None => count * element,
        Some(Format::Int8) => count + outputs * element,
        Some(Format::Int4 { group }) => count / 2.0 + count / group.max(1) as f64 * element,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphs::{DType, Logits, Model};
    use serde_json::json;

    fn network(tied: bool) -> Network {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
            "tie_word_embeddings": tied,
        });
        Model::from_config(&config).unwrap().networks(DType::Float16, Logits::Last).unwrap().remove(0)
    }

    /// The floor figures of LLaMA-7B: 12.952 GB of linear layers, 0.262 of the head, 0.537 of cache at 1024 rows.
    #[test]
    fn a_decode_step_of_llama_7b() {
        let Cost { operations, weight_bytes, cache_bytes } =
            cost(&network(false), Call { batch: 1, tokens: 1, past: 1023, source: 0 });
        assert!((weight_bytes / 1e9 - 13.214).abs() < 2e-3, "{weight_bytes}");
        assert!((cache_bytes / 1e9 - 0.537).abs() < 1e-3, "{cache_bytes}");
        assert!((operations / 2.0 - (6.607e9 + 0.268e9)).abs() < 2e7, "{operations}");
        // A tied table is read whole after all, as the head.
        let tied = cost(&network(true), Call { batch: 1, tokens: 1, past: 0, source: 0 });
        assert!((tied.weight_bytes - weight_bytes).abs() < 1.0);
    }

    /// 132 bytes a row in the place of 256.
    #[test]
    fn rows_in_int8() {
        let mut network = network(false);
        let call = Call { batch: 8, tokens: 1, past: 2047, source: 0 };
        let plain = cost(&network, call);
        for node in &mut network.nodes {
            if let Op::Attention(attention) = &mut node.op {
                attention.int8_cache = true;
            }
        }
        let kept = cost(&network, call);
        assert_eq!(kept.cache_bytes, 8.0 * 2048.0 * 32.0 * 2.0 * 32.0 * 132.0);
        assert_eq!((kept.cache_bytes * 256.0, kept.weight_bytes), (plain.cache_bytes * 132.0, plain.weight_bytes));
    }

    /// 26.5 TFLOP of linear layers and 1.1 of causal attention.
    #[test]
    fn a_prefill_of_2048_tokens() {
        let found = cost(&network(false), Call { batch: 1, tokens: 2048, past: 0, source: 0 }).operations / 1e12;
        assert!((found - 27.6).abs() < 0.1, "{found}");
    }

    /// flan-t5-xl's decoder reads its own 100 rows and 500 of the encoder at every step; the rows of the encoder's keys are
    /// made once.
    #[test]
    fn a_decode_step_behind_an_encoder() {
        let config = json!({
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 2048, "d_ff": 5120,
            "d_kv": 64, "num_heads": 32, "num_layers": 24, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": false,
        });
        let networks = Model::from_config(&config).unwrap().networks(DType::Float16, Logits::Last).unwrap();
        let call = Call { batch: 2, tokens: 1, past: 99, source: 500 };
        let [encoder, cross, decoder] = [0, 1, 2].map(|place| cost(&networks[place], call));
        assert_eq!(decoder.cache_bytes, 24.0 * 2.0 * (100.0 + 500.0) * 2.0 * 2048.0 * 2.0);
        let matrices = 24.0 * (6.0 * 2048.0 * 2048.0 + 3.0 * 2048.0 * 5120.0) + 32128.0 * 2048.0;
        let attention = 24.0 * 4.0 * 2.0 * 2048.0 * 600.0;
        assert_eq!(decoder.operations, 2.0 * 2.0 * matrices + attention);
        assert_eq!(cross.operations, 24.0 * 2.0 * 2.0 * 2.0 * 500.0 * 2048.0 * 2048.0);
        let matrices = 24.0 * (4.0 * 2048.0 * 2048.0 + 3.0 * 2048.0 * 5120.0);
        let attention = 24.0 * 4.0 * 2.0 * 2048.0 * 500.0 * 500.0;
        assert_eq!((encoder.operations, encoder.cache_bytes), (2.0 * 2.0 * 500.0 * matrices + attention, 0.0));
    }
}
