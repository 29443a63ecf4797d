//! VILA against goldens that transformers' LLaMA, SigLIP and CLIP made: name coverage, parity, the text of layers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::{Array, Caches, Interpreter, Values};
use graphs::{Axis, DType, Graph, Logits, Model, Type, Weight};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const PARTS: [&str; 3] = ["llm", "vision_tower", "mm_projector"];
/// Name, parts, side of the picture, tensors used and known to be unused.
const FIXTURES: [(&str, &[&str], usize, [usize; 2]); 2] =
    [("vila-v15-siglip", &PARTS, 35, [62, 29]), ("vila-v10-clip", &[], 28, [62, 18])];

#[test]
fn every_tensor_is_used_or_known_to_be_unused() {
    for (name, parts, _, counts) in FIXTURES {
        let fixture = open(name, parts);
        let coverage = fixture.coverage(&fixture.networks(Logits::Last));
        assert_eq!(coverage.missing, Vec::<String>::new(), "{name}");
        assert_eq!(coverage.unused, Vec::<String>::new(), "{name}");
        // The last vision block (feature layer -2), the norm behind it and SigLIP's head.
        assert_eq!([coverage.found.len(), coverage.ignored.len()], counts, "{name}");
    }
}

#[test]
fn vision_and_language_agree_with_transformers() {
    for (name, parts, side, _) in FIXTURES {
        let fixture = open(name, parts);
        let [vision, language] = &fixture.interpreters(Logits::All)[..] else { panic!("{name}") };
        let pixels = Array::float([1, 3, side, side], fixture.golden("pixel_values"));
        let (projected, values) = see(vision, pixels);
        let wanted = fixture.golden("vision_features");
        let same = |values: &&Vec<f32>| values.len() == wanted.len() && worst(values, &wanted) < 1e-4;
        // What the projector reads: either the last block's sum, or the same without its class token.
        let path = if parts.is_empty() { "mlp.fc2.bias/binary/slice" } else { "mlp.fc2.bias/binary" };
        let path = format!("vision_tower.vision_model.encoder.layers.1.{path}");
        assert!(values.get(&path).filter(same).is_some(), "{name}");
        assert!(worst(&projected, &fixture.golden("projector_out")) < 1e-4, "{name}");

        let facts = fixture.model.facts();
        let rows = facts.pictures.unwrap().features;
        let pictures: Vec<i32> = (facts.vocab..facts.vocab + rows).map(|id| id as i32).collect();
        let ids = [fixture.golden_ints("ids_before"), pictures, fixture.golden_ints("ids_after")].concat();
        let table = Array::float([rows, facts.hidden], projected);
        let logits = continue_prompt(language, &ids, &table, &fixture.golden_ints("generated"));
        let last = fixture.golden("logits_last");
        assert!(worst(&logits[logits.len() - last.len()..], &last) < 1e-4, "{name}");
    }
}

#[test]
fn layers_as_text() {
    let networks = open("vila-v15-siglip", &PARTS).model.networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("siglip_embeddings", lines(&networks[0], " vision_tower.vision_model.embeddings."));
    insta::assert_snapshot!("siglip_layer", lines(&networks[0], " vision_tower.vision_model.encoder.layers.0."));
    let text = lines(&networks[0], "");
    let projector: Vec<&str> = text.lines().skip_while(|line| !line.contains("/reshape = ")).skip(1).collect();
    let start = projector.iter().position(|line| line.contains("/reshape = ")).unwrap();
    insta::assert_snapshot!("mlp_downsample", projector[start..].join("\n"));
    let networks = open("vila-v10-clip", &[]).model.networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("mlp2x_gelu", lines(&networks[0], " mm_projector."));
}

fn config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlavaLlamaModel"],
        "llm_cfg": { "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1,
            "vocab_size": 8 },
        "vision_tower_cfg": { "model_type": "siglip_vision_model", "hidden_size": 4, "num_attention_heads": 1,
            "intermediate_size": 4, "num_hidden_layers": 2, "image_size": 10, "patch_size": 2 },
        "mm_projector_cfg": { "mm_projector_type": "mlp_downsample" },
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn projectors_read_what_their_names_say() {
    let found = |kind: &str, image_size: usize| {
        let mut config = config(json!({ "mm_projector_cfg": { "mm_projector_type": kind } }));
        config["vision_tower_cfg"]["image_size"] = json!(image_size);
        let model = Model::from_config(&config).unwrap();
        let networks = model.networks(DType::Float32, Logits::Last).unwrap();
        let names = networks[0].weights().flat_map(|(_, weight)| weight.tensors());
        let names: Vec<String> =
            names.filter_map(|(name, _)| name.strip_prefix("mm_projector.").map(Into::into)).collect();
        (names.join(" "), model.facts().pictures.unwrap().features)
    };
    assert_eq!(found("linear", 10), ("layers.weight layers.bias".into(), 25));
    assert_eq!(found("mlp1x_gelu", 10), ("layers.0.weight layers.0.bias".into(), 25));
    let three = "layers.0.weight layers.0.bias layers.2.weight layers.2.bias layers.4.weight layers.4.bias";
    assert_eq!(found("mlp3x_gelu", 10), (three.into(), 25));
    let downsample = "layers.1.weight layers.1.bias layers.2.weight layers.2.bias layers.4.weight layers.4.bias";
    assert_eq!(found("mlp_downsample", 10), (downsample.into(), 9));
    assert_eq!(found("mlp_downsample", 8), (downsample.into(), 4));
}

#[test]
fn configs_that_mean_something_else_are_refused() {
    for (changes, wanted) in [
        (json!({ "mm_projector_cfg": { "mm_projector_type": "mlp0x_gelu" } }), "mm_projector_cfg.mm_projector_type"),
        (json!({ "mm_projector_cfg": { "mm_projector_type": "mlp99999999x_gelu" } }), "mm_projector_type"),
        (json!({ "mm_vision_select_feature": "patch" }), "mm_vision_select_feature"),
        (json!({ "mm_vision_select_layer": -4 }), "mm_vision_select_layer"),
        (json!({ "mm_vision_select_layer": [-1, -2] }), "mm_vision_select_layer"),
        (json!({ "image_aspect_ratio": "anyres" }), "image_aspect_ratio"),
        (json!({ "s2": true }), "s2"),
        (json!({ "llm_cfg": "somewhere/llm" }), "llm_cfg"),
        (json!({ "llm_cfg": { "model_type": "mixtral" } }), "llm_cfg.model_type"),
        (json!({ "vision_tower_cfg": { "model_type": "intern_vit_6b" } }), "vision_tower_cfg.model_type"),
        (json!({ "vision_tower_cfg": null }), "vision_config.model_type"),
    ] {
        let error = Model::from_config(&config(changes)).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

struct Nothing;

impl Values for Nothing {
    fn values(&self, _: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        Err("no weights".into())
    }
}

#[test]
fn zeros_are_put_behind_an_axis() {
    for (axis, after, wanted) in [
        (1, 1, vec![1., 2., 3., 4., 0., 0., 5., 6., 7., 8., 0., 0.]),
        (2, 2, vec![1., 2., 0., 0., 3., 4., 0., 0., 5., 6., 0., 0., 7., 8., 0., 0.]),
    ] {
        let graph = Graph::new("pad", DType::Float32);
        let x = graph.input("x", Type::new(DType::Float32, [Axis::Batch.into(), 2.into(), 2.into()]));
        graph.output("y", x.pad(axis, after));
        let network = graph.finish().unwrap();
        lines(&network, "");
        let interpreter = Interpreter::new(network, &Nothing).unwrap();
        let x = Array::float([2, 2, 2], (1..9).map(|value| value as f32).collect());
        let mut caches = Caches::new(interpreter.network(), 2, 0);
        let y = &interpreter.run(&BTreeMap::from([("x", x)]), &mut caches, None).unwrap()["y"];
        assert_eq!((y.shape[axis], y.floats().unwrap()), (2 + after, &wanted[..]));
    }
    for (axis, after) in [(0, 1), (1, 0), (3, 1), (1, usize::MAX)] {
        let graph = Graph::new("pad", DType::Float32);
        let x = graph.input("x", Type::new(DType::Float32, [Axis::Batch.into(), 2.into(), 2.into()]));
        graph.output("y", x.pad(axis, after));
        assert!(graph.finish().unwrap_err().to_string().contains("zeros behind axis") || after == usize::MAX);
    }
}
