use super::super::{Plan, run};
use crate::calibration::{Channels, Vectors, Wanted};
use graphs::interpret::{Array, Caches, Interpreter, Values};
use graphs::{DType, Logits, Model, Network, Op, Weight};
use proptest::prelude::*;
use quant::{MemorySource, Method, Recipe, Source, materialize, materialize_f32};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};

fn llama(kv_heads: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": kv_heads, "vocab_size": 64, "max_position_embeddings": 64,
        "attention_bias": true,
    })
}

fn opt(norm_first: bool) -> Value {
    json!({
        "architectures": ["OPTForCausalLM"], "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
        "do_layer_norm_before": norm_first,
    })
}

fn t5(projection: &str) -> Value {
    json!({
        "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4,
        "num_layers": 1, "vocab_size": 64, "feed_forward_proj": projection,
    })
}

fn networks(config: &Value, dtype: DType) -> Vec<Network> {
    Model::from_config(config).unwrap().networks(dtype, Logits::Last).unwrap()
}

fn passed(network: Network, quant: &str) -> super::Passed {
    let recipe = Recipe::load(quant).unwrap();
    run(network, &Plan::new(&recipe)).unwrap()
}

fn layers(network: &Network) -> String {
    let text = graphs::print(network);
    text.lines().filter(|line| line.contains("layers.0.")).collect::<Vec<_>>().join("\n")
}

#[test]
fn before_and_after() {
    for (name, config) in [("llama", llama(2)), ("opt", opt(true))] {
        let network = networks(&config, DType::Float16).remove(0);
        insta::assert_snapshot!(format!("{name}_before"), layers(&network));
        insta::assert_snapshot!(format!("{name}_awq"), layers(&passed(network.clone(), "int4-awq-g16").network));
        insta::assert_snapshot!(format!("{name}_smoothed"), layers(&passed(network, "int8-sq").network));
    }
}

/// Ops of their own stand only where nothing before can take the factors.
#[test]
fn where_factors_go() {
    let own = |config: &Value| -> Vec<String> {
        let all = networks(config, DType::Float16).into_iter().map(|network| passed(network, "int8-sq-token").network);
        let own = all.flat_map(|network| network.nodes).filter(|node| matches!(node.op, Op::ScaleBy { .. }));
        own.map(|node| node.path).collect()
    };
    assert_eq!(own(&llama(4)), Vec::<String>::new());
    assert_eq!(own(&llama(2)), Vec::<String>::new(), "shared keys share factors");
    assert_eq!(own(&opt(true)), Vec::<String>::new());
    // Behind the last op: what a norm gives is added up again.
    let root = "model.decoder.layers.0";
    assert_eq!(
        own(&opt(false)),
        ["model.decoder.embed_positions/binary/scale_by", &format!("{root}.self_attn_layer_norm/scale_by")]
    );
    // Keys and values of the encoder's output come from another network.
    let cross = ["encoder_output/scale_by", "decoder.block.0.layer.1.EncDecAttention.attention/scale_by"];
    assert_eq!(own(&t5("relu")), cross);
    assert_eq!(own(&t5("gated-gelu")), cross);
    // What passes through another activation than ReLU has its factors in front of it.
    let gelu = json!({ "activation_function": "gelu" });
    let mut config = opt(true);
    config["activation_function"] = gelu["activation_function"].clone();
    assert_eq!(own(&config), [format!("{root}.fc1.bias/activation/scale_by")]);
}

/// Tensors of the network and vectors of the pass, drawn by name.
fn source(network: &Network, wanted: &[Wanted], seed: u64) -> MemorySource {
    let mut source = MemorySource::default();
    let names: BTreeMap<String, Vec<usize>> = network
        .weights()
        .flat_map(|(_, weight)| weight.tensors())
        .map(|(name, shape)| (name.into(), shape.to_vec()))
        .collect();
    for (name, shape) in names {
        let count: usize = shape.iter().product();
        let vector = wanted.iter().any(|wanted| wanted.name() == name);
        let mut state =
            name.bytes().fold(seed | 1, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let values = (0..count).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            match (vector, name.contains("norm")) {
                // Factors from 1/4 to 4.
                (true, _) => (2.0 * value).exp2(),
                (_, true) => 1.0 + 0.3 * value,
                _ => value * 2.0 / (*shape.last().unwrap() as f32).sqrt(),
            }
        });
        source.insert(name.clone(), DType::Float32, &shape, values.flat_map(f32::to_le_bytes).collect());
    }
    source
}

struct Plain<'s>(&'s MemorySource);

impl Values for Plain<'_> {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(materialize_f32(weight, self.0, DType::Float32)?)
    }
}

/// The network with nothing rounded: quantized weights as what they are made of, inputs as they come.
fn unrounded(mut network: Network) -> Network {
    let mut instead = HashMap::new();
    for (place, node) in network.nodes.iter_mut().enumerate() {
        for input in &mut node.inputs {
            *input = *instead.get(input).unwrap_or(input);
        }
        match &mut node.op {
            Op::Linear { weight, .. } => {
                if let Weight::Packed { of, .. } = weight {
                    *weight = (**of).clone();
                }
            }
            Op::QuantizeInput { .. } => drop(instead.insert(graphs::NodeId(place), node.inputs[0])),
            _ => {}
        }
    }
    network
}

fn outputs(network: &Network, source: &MemorySource) -> BTreeMap<String, Array> {
    let tokens = 5;
    let interpreter = Interpreter::new(network.clone(), &Plain(source)).unwrap();
    let input = |node: &graphs::Node| {
        let shape: Vec<usize> = node
            .ty
            .shape
            .iter()
            .enumerate()
            .map(|(axis, dim)| dim.fixed().unwrap_or(if axis == 0 { 1 } else { tokens }))
            .collect();
        let count: usize = shape.iter().product();
        let array = match (node.ty.dtype, node.path.as_str()) {
            (DType::Int32, "input_ids") => Array::int(shape, (0..count).map(|at| (at * 7 % 64) as i32).collect()),
            (DType::Int32, "position_ids") => Array::int(shape, (0..count as i32).collect()),
            (DType::Int32, "past_lengths") => Array::int(shape, vec![0; count]),
            (DType::Int32, "last_token_ids") => Array::int(shape, vec![tokens as i32 - 1; count]),
            (DType::Int32, _) => Array::int(shape, vec![tokens as i32; count]),
            _ => Array::float(shape, (0..count).map(|at| (at as f32 * 0.7).sin()).collect()),
        };
        (node.path.clone(), array)
    };
    let inputs: BTreeMap<String, Array> = network.inputs().map(input).collect();
    interpreter.run(&inputs, &mut Caches::new(network, 1, tokens), None).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the factors are, moving them changes nothing: only rounding does.
    #[test]
    fn factors_cancel(
        config in prop_oneof![
            prop::sample::select(vec![1, 2, 4]).prop_map(llama), any::<bool>().prop_map(opt),
            prop::sample::select(vec!["relu", "gated-gelu"]).prop_map(t5),
        ],
        quant in prop::sample::select(vec!["int4-awq-g16", "int8-sq", "int8-sq-token"]),
        seed in any::<u64>(),
    ) {
        for network in networks(&config, DType::Float32) {
            let passed = passed(network.clone(), quant);
            let source = source(&passed.network, &passed.wanted, seed);
            let rounded = outputs(&passed.network, &source);
            let (wanted, found) = (outputs(&network, &source), outputs(&unrounded(passed.network), &source));
            let mut moved = 0.0f32;
            for (name, wanted) in &wanted {
                let (wanted, found) = (wanted.floats().unwrap(), found[name].floats().unwrap());
                let most = wanted.iter().fold(1.0f32, |most, value| most.max(value.abs()));
                for (at, (wanted, found)) in wanted.iter().zip(found).enumerate() {
                    prop_assert!((wanted - found).abs() < 1e-5 * most, "{name}[{at}]: {wanted} {found}");
                }
                let rounded = rounded[name].floats().unwrap();
                moved = wanted.iter().zip(rounded).fold(moved, |most, (a, b)| most.max((a - b).abs()));
            }
            prop_assert!(moved > 1e-4, "rounding changes something");
        }
    }
}

/// Every matrix that is scaled, clipped and packed, cut for two ranks as its layer is and joined again.
#[test]
fn shards_joined_are_the_whole() {
    for quant in ["int4-awq-g16", "int8-sq", "int8-awq"] {
        let passed = passed(networks(&llama(2), DType::Float16).remove(0), quant);
        let source = source(&passed.network, &passed.wanted, 5);
        let mut cut = 0;
        for (_, weight) in passed.network.weights().filter(|(_, weight)| weight.format().is_some()) {
            let whole = materialize(weight, &source, DType::Float16).unwrap();
            for axis in [0, 1] {
                let half = weight.shape()[axis] / 2 / 16 * 16;
                let part = |start, end| Weight::Slice { axis, start, end, of: Box::new(weight.clone()) };
                let joined = Weight::Concat { axis, parts: vec![part(0, half), part(half, weight.shape()[axis])] };
                assert_eq!(materialize(&joined, &source, DType::Float16).unwrap(), whole, "{}", weight.key());
                cut += 1;
            }
        }
        assert_eq!(cut, 14);
    }
}

/// Only names and shapes are there before a search; what is asked of them then is refused, not made up.
#[test]
fn vectors_have_shapes_before_values() {
    let wanted = Wanted::Factors {
        name: "v".into(),
        input: "language/x".into(),
        method: Method::Awq,
        channels: Channels::Shared { heads: 4, kv_heads: 2, head_dim: 8 },
        width: 32,
        members: Vec::new(),
    };
    let (vectors, base) = (Vectors::new([&wanted].into_iter()), MemorySource::default());
    let over = vectors.over(&base);
    assert_eq!(over.entry("v").unwrap().shape, [16]);
    assert!(over.read("v", 0, &mut [0; 4]).is_err());
}
