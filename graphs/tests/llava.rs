//! LLaVA against the goldens that transformers made: name coverage, parity, the text of one layer.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::{Array, Caches, Interpreter};
use graphs::{DType, Logits, Network};
use safetensors::SafeTensors;
use std::collections::BTreeMap;

const FIXTURES: [&str; 3] = ["llava-hf", "llava-v4names", "llava-v5names"];

#[test]
fn every_tensor_is_used_or_known_to_be_unused() {
    for name in FIXTURES {
        let fixture = open(name);
        let coverage = covered(&fixture, &fixture.model.networks(DType::Float32, Logits::Last).unwrap());
        assert_eq!(coverage.missing, Vec::<String>::new(), "{name}");
        assert_eq!(coverage.unused, Vec::<String>::new(), "{name}");
        // The last vision block (feature layer -2) and the norm behind it.
        assert_eq!((coverage.found.len(), coverage.ignored.len()), (62, 18), "{name}");
    }
}

#[test]
fn vision_and_language_agree_with_transformers() {
    for name in FIXTURES {
        let fixture = open(name);
        let networks = fixture.model.networks(DType::Float32, Logits::All).unwrap();
        let coverage = covered(&fixture, &networks);
        let source = Tensors { file: SafeTensors::deserialize(&fixture.weights).unwrap(), coverage: &coverage };
        let golden = SafeTensors::deserialize(&fixture.golden).unwrap();
        let [vision, language] =
            <[Network; 2]>::try_from(networks).unwrap().map(|network| Interpreter::new(network, &source).unwrap());

        let pixels = Array::float([1, 3, 28, 28], floats(&golden, "pixel_values"));
        let mut features = Vec::new();
        let mut tap = |node: &graphs::Node, value: &Array| {
            if matches!(node.op, graphs::Op::Slice { .. }) {
                features = value.floats().unwrap().to_vec();
            }
        };
        let mut caches = Caches::new(vision.network(), 1, 0);
        let outputs = vision.run(&BTreeMap::from([("input", pixels)]), &mut caches, Some(&mut tap)).unwrap();
        let projected = outputs["output"].floats().unwrap();
        assert!(worst(&features, &floats(&golden, "vision_features")) < 1e-4, "{name}");
        assert!(worst(projected, &floats(&golden, "projector_out")) < 1e-4, "{name}");

        let image = fixture.model.facts().pictures.unwrap().token_id.unwrap();
        check_language(&language, &fixture.model.facts(), &golden, projected, image as i32);
    }
}

#[test]
fn one_layer_as_text() {
    let networks = open("llava-hf").model.networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("clip_layer", lines(&networks[0], " vision_tower.vision_model.encoder.layers.0."));
    insta::assert_snapshot!("llama_layer", lines(&networks[1], " language_model.model.layers.0."));
}
