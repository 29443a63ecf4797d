//! BLIP-2 with T5 against the golden that transformers made, and T5 alone: name coverage, parity, the text of layers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::{Array, Caches, Interpreter, Values};
use graphs::{DType, Logits, Model, Node, Weight, cover};
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[test]
fn every_tensor_is_used() {
    let fixture = open("blip2-t5", &[]);
    let networks = fixture.model.networks(DType::Float32, Logits::Last).unwrap();
    let names: Vec<&str> = networks.iter().map(|network| network.name.as_str()).collect();
    assert_eq!(names, ["vision", "encoder", "cross", "decoder"]);
    let coverage = fixture.coverage(&networks);
    assert_eq!((coverage.missing, coverage.unused, coverage.ignored), (vec![], vec![], vec![]));
    assert_eq!(coverage.found.len(), 171);
    // Without a head the embedding is the head; copies of the embedding may lie in the file.
    let copies = ["language_model.decoder.embed_tokens.weight", "language_model.encoder.embed_tokens.weight"];
    let names = fixture.names();
    let names = names.iter().map(String::as_str).filter(|name| !name.ends_with("lm_head.weight")).chain(copies);
    let coverage = cover(&fixture.model, &networks, names);
    assert_eq!((coverage.missing, coverage.unused), (vec![], vec![]));
    assert_eq!(coverage.found["language_model.lm_head.weight"], "language_model.shared.weight");
    assert_eq!(coverage.ignored, copies);
}

/// The prompt goes through the encoder once, then the decoder makes the golden's ids one by one.
#[test]
fn all_networks_agree_with_transformers() {
    let fixture = open("blip2-t5", &[]);
    let facts = fixture.model.facts();
    let [vision, encoder, cross, decoder] = &fixture.interpreters(Logits::Last)[..] else { panic!("four networks") };
    let mut none = Caches::new(vision.network(), 1, 0);
    let (projected, _) = see(vision, Array::float([1, 3, 28, 28], fixture.golden("pixel_values")));
    let error = worst(&projected, &fixture.golden("projector_out"));
    assert!(error < 1e-4, "{error}");
    let (mut ids, _) = spliced(&fixture, 237);
    // Two rows more than count: what pads a prompt must not change it.
    let length = ids.len();
    ids.extend([5, 6]);
    let lengths = Array::int([1], vec![length as i32]);
    let inputs = BTreeMap::from([
        ("input_ids", Array::int([1, length + 2], ids)),
        ("source_lengths", lengths.clone()),
        ("prompt_embedding_table", Array::float([4, facts.hidden], projected)),
    ]);
    let encoded = encoder.run(&inputs, &mut none, None).unwrap();
    let mut read = cross.run(&encoded, &mut none, None).unwrap();
    read.insert("source_lengths".into(), lengths);
    let start = facts.decoder_start_id.unwrap() as i32;
    let generated = [vec![start], fixture.golden_ints("generated")].concat();
    let mut caches = Caches::new(decoder.network(), 1, generated.len());
    for (past, pair) in generated.windows(2).enumerate() {
        let own = [
            ("input_ids", Array::int([1, 1], vec![pair[0]])),
            ("past_lengths", Array::int([1], vec![past as i32])),
            ("sequence_lengths", Array::int([1], vec![past as i32 + 1])),
            ("last_token_ids", Array::int([1], vec![0])),
        ];
        let mut inputs = read.clone();
        inputs.extend(own.map(|(name, array)| (name.to_owned(), array)));
        let outputs = decoder.run(&inputs, &mut caches, None).unwrap();
        let logits = outputs["logits"].floats().unwrap();
        if past == 0 {
            let error = worst(logits, &fixture.golden("logits"));
            assert!(error < 1e-4, "{error}");
        }
        let best = (0..facts.vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        assert_eq!(best as i32, pair[1], "token {past}");
    }
}

fn config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 32, "d_ff": 48, "d_kv": 8,
        "num_heads": 4, "num_layers": 1, "vocab_size": 64,
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

#[test]
fn one_layer_as_text() {
    let networks = open("blip2-t5", &[]).model.networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("encoder_block", lines(&networks[1], " language_model.encoder.block.1."));
    insta::assert_snapshot!("cross_block", lines(&networks[2], " language_model.decoder.block.1."));
    insta::assert_snapshot!("decoder_block", lines(&networks[3], " language_model.decoder.block.1."));
}

#[test]
fn heads_are_scaled_as_the_config_says() {
    let scaled = |changes: Value| {
        let networks = Model::from_config(&config(changes)).unwrap().networks(DType::Float32, Logits::Last).unwrap();
        networks[2].nodes.iter().any(|node| node.op.name() == "scale")
    };
    assert!(scaled(json!({})));
    assert!(!scaled(json!({ "tie_word_embeddings": false })));
    assert!(!scaled(json!({ "scale_decoder_outputs": false })));
}

/// Weights of no meaning; those of `wo` so large that what they give leaves float16's range.
struct Large;

impl Values for Large {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        let scale = if weight.key().ends_with("wo.weight") { 3e4 } else { 1.0 };
        Ok((0..weight.count()).map(|i| scale * ((i * 37 % 101) as f32 / 50.0 - 1.0)).collect())
    }
}

/// In float16 no result of that type leaves its range, the residual stream does, and all is as in float32.
#[test]
fn large_activations_fit_float16() {
    const LARGEST: f32 = 65504.0;
    for projection in ["relu", "gated-gelu"] {
        let model = Model::from_config(&config(json!({ "feed_forward_proj": projection }))).unwrap();
        let encode = |dtype: DType| {
            let encoder = model.networks(dtype, Logits::Last).unwrap().remove(0);
            let encoder = Interpreter::new(encoder, &Large).unwrap();
            let inputs = BTreeMap::from([
                ("input_ids", Array::int([1, 3], vec![5, 9, 2])),
                ("source_lengths", Array::int([1], vec![3])),
            ]);
            let mut largest = BTreeMap::new();
            let mut tap = |node: &Node, value: &Array| {
                let most =
                    value.floats().map_or(0.0, |values| values.iter().fold(0.0, |most: f32, x| most.max(x.abs())));
                let entry = largest.entry(node.ty.dtype.name()).or_insert(0.0);
                *entry = most.max(*entry);
            };
            let outputs = encoder.run(&inputs, &mut Caches::new(encoder.network(), 1, 0), Some(&mut tap)).unwrap();
            (outputs["encoder_output"].floats().unwrap().to_vec(), largest)
        };
        let ((narrow, largest), (wide, _)) = (encode(DType::Float16), encode(DType::Float32));
        assert!(worst(&narrow, &wide) < 1e-5, "{projection}");
        assert!(largest["float16"] < LARGEST && largest["float32"] > LARGEST, "{projection}: {largest:?}");
    }
}

#[test]
fn configs_that_do_not_fit_are_refused() {
    for (changes, wanted) in [
        (json!({ "feed_forward_proj": "gated-tanh" }), "feed_forward_proj"),
        (json!({ "relative_attention_num_buckets": 2 }), "relative_attention_num_buckets"),
        (json!({ "relative_attention_max_distance": 16 }), "relative_attention_num_buckets"),
        (json!({ "decoder_start_token_id": -1 }), "decoder_start_token_id"),
        (json!({ "d_kv": 0 }), "d_kv"),
    ] {
        let error = Model::from_config(&config(changes)).unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
}
