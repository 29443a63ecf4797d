//! BLIP-2 with OPT against the golden that transformers made, and OPT alone: name coverage, parity, the text of one layer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::Array;
use graphs::{DType, Logits, Model, cover};
use serde_json::{Value, json};

#[test]
fn every_tensor_is_used_or_known_to_be_unused() {
    let fixture = open("blip2-opt", &[]);
    let networks = fixture.model.networks(DType::Float32, Logits::Last).unwrap();
    let coverage = fixture.coverage(&networks);
    assert_eq!((coverage.missing, coverage.unused, coverage.ignored), (vec![], vec![], vec![]));
    assert_eq!(coverage.found.len(), 155);
    // What older files hold besides: the Q-Former's part for text, and the head, which repeats the embedding.
    let old = [
        "language_model.lm_head.weight",
        "qformer.embeddings.position_ids",
        "qformer.embeddings.word_embeddings.weight",
        "qformer.encoder.layer.3.intermediate.dense.weight",
        "qformer.encoder.layer.3.output.LayerNorm.bias",
    ];
    let odd =
        ["qformer.encoder.layer.1.crossattention.attention.key.weight", "qformer.encoder.layer.0.attention.output.x"];
    let names = fixture.names();
    let names = names.iter().map(String::as_str).chain(old).chain(odd);
    let coverage = cover(&fixture.model, &networks, names);
    assert_eq!(coverage.ignored, old);
    assert_eq!(coverage.unused, [odd[1], odd[0]]);
}

#[test]
fn vision_and_language_agree_with_transformers() {
    let fixture = open("blip2-opt", &[]);
    let [vision, language] = &fixture.interpreters(Logits::All)[..] else { panic!("two networks") };
    let (projected, values) = see(vision, Array::float([1, 3, 28, 28], fixture.golden("pixel_values")));
    for (found, name) in [
        (&values["vision_model.post_layernorm"], "vision_features"),
        (&values["qformer.encoder.layer.3.output_query.LayerNorm"], "qformer_out"),
        (&projected, "projector_out"),
    ] {
        let error = worst(found, &fixture.golden(name));
        assert!(error < 1e-4, "{name}: {error}");
    }
    check_language(&fixture, language, projected, 320);
}

#[test]
fn one_layer_as_text() {
    let networks = open("blip2-opt", &[]).model.networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("eva_layer", lines(&networks[0], " vision_model.encoder.layers.0."));
    insta::assert_snapshot!("qformer_layer", lines(&networks[0], " qformer.encoder.layer.0."));
    insta::assert_snapshot!("opt_layer", lines(&networks[1], " language_model.model.decoder.layers.0."));
}

fn config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "vocab_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 16,
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

#[test]
fn opt_alone_has_the_layers_that_its_config_says() {
    let paths = |changes: Value| -> Vec<String> {
        let networks = Model::from_config(&config(changes)).unwrap().networks(DType::Float32, Logits::Last).unwrap();
        networks[0].nodes.iter().map(|node| node.path.clone()).collect()
    };
    let place = |paths: &[String], path: &str| paths.iter().position(|found| found == path);
    let usual = paths(json!({}));
    let order = ["self_attn_layer_norm", "self_attn.out_proj.bias", "final_layer_norm", "fc2.bias"];
    let places = |paths: &[String]| order.map(|name| place(paths, &format!("model.decoder.layers.0.{name}")).unwrap());
    assert!(places(&usual).is_sorted() && place(&usual, "model.decoder.final_layer_norm").is_some());
    assert_eq!(place(&usual, "prompt_embedding_table"), None);
    assert_eq!(place(&usual, "model.decoder.project_in"), None);
    // As in opt-350m.
    let other = paths(json!({ "do_layer_norm_before": false, "word_embed_proj_dim": 24, "enable_bias": false }));
    let other_order = ["self_attn.out_proj", "self_attn_layer_norm", "fc2", "final_layer_norm"];
    let places = other_order.map(|name| place(&other, &format!("model.decoder.layers.0.{name}")).unwrap());
    assert!(places.is_sorted(), "{places:?}");
    assert_eq!(place(&other, "model.decoder.final_layer_norm"), None);
    assert!(
        place(&other, "model.decoder.project_in").is_some() && place(&other, "model.decoder.project_out").is_some()
    );
}

#[test]
fn configs_that_do_not_fit_are_refused() {
    let blip2 = |changes: Value| {
        let mut config = json!({
            "architectures": ["Blip2ForConditionalGeneration"], "text_config": config(json!({})),
            "vision_config": { "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1 },
            "qformer_config": { "hidden_size": 24, "num_attention_heads": 4, "encoder_hidden_size": 32 },
        });
        for (part, changes) in changes.as_object().unwrap() {
            config[part].as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        }
        Model::from_config(&config).map_err(|error| error.to_string())
    };
    // Older files name no image token.
    assert_eq!(blip2(json!({})).unwrap().facts().pictures.unwrap().token_id, None);
    for (changes, wanted) in [
        (json!({ "text_config": { "model_type": "bloom" } }), "text_config.model_type"),
        (json!({ "text_config": { "word_embed_proj_dim": 16 } }), "text_config.word_embed_proj_dim"),
        (json!({ "text_config": { "num_attention_heads": 5 } }), "text_config.num_attention_heads"),
        (json!({ "text_config": { "layer_norm_elementwise_affine": false } }), "layer_norm_elementwise_affine"),
        (json!({ "qformer_config": { "encoder_hidden_size": 48 } }), "qformer_config.encoder_hidden_size"),
        (json!({ "qformer_config": { "cross_attention_frequency": 0 } }), "cross_attention_frequency"),
        (json!({ "qformer_config": { "use_qformer_text_input": true } }), "use_qformer_text_input"),
        (json!({ "vision_config": { "num_attention_heads": 3 } }), "vision_config.num_attention_heads"),
        (json!({ "vision_config": { "patch_size": 300 } }), "vision_config.patch_size"),
    ] {
        let error = blip2(changes).unwrap_err();
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
}
