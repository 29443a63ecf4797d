//! LLaVA against the goldens that transformers made: name coverage, parity, the text of one layer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::Array;
use graphs::{DType, Logits};

const FIXTURES: [&str; 3] = ["llava-hf", "llava-v4names", "llava-v5names"];

#[test]
fn every_tensor_is_used_or_known_to_be_unused() {
    for name in FIXTURES {
        let fixture = open(name, &[]);
        let coverage = fixture.coverage(&fixture.networks(Logits::Last));
        assert_eq!(coverage.missing, Vec::<String>::new(), "{name}");
        assert_eq!(coverage.unused, Vec::<String>::new(), "{name}");
        // The last vision block (feature layer -2) and the norm behind it.
        assert_eq!((coverage.found.len(), coverage.ignored.len()), (62, 18), "{name}");
    }
}

#[test]
fn vision_and_language_agree_with_transformers() {
    for name in FIXTURES {
        let fixture = open(name, &[]);
        let [vision, language] = &fixture.interpreters(Logits::All)[..] else { panic!("{name}") };
        let pixels = Array::float([1, 3, 28, 28], fixture.golden("pixel_values"));
        let (projected, values) = see(vision, pixels);
        let (_, features) = values.iter().find(|(path, _)| path.ends_with("/slice")).unwrap();
        assert!(worst(features, &fixture.golden("vision_features")) < 1e-4, "{name}");
        assert!(worst(&projected, &fixture.golden("projector_out")) < 1e-4, "{name}");
        let image = fixture.model.facts().pictures.unwrap().token_id.unwrap();
        check_language(&fixture, language, projected, image);
    }
}

#[test]
fn one_layer_as_text() {
    let networks = open("llava-hf", &[]).model.networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("clip_layer", lines(&networks[0], " vision_tower.vision_model.encoder.layers.0."));
    insta::assert_snapshot!("llama_layer", lines(&networks[1], " language_model.model.layers.0."));
}
