//! Nougat against the golden that transformers made, and mBART alone: name coverage, parity, the text of layers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::{Array, Caches, Interpreter};
use graphs::{DType, Entry, Logits, Model, Op, cover};
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[test]
fn every_tensor_is_used_or_known_to_be_unused() {
    let fixture = open("nougat", &[]);
    let networks = fixture.networks(Logits::Last);
    let names: Vec<&str> = networks.iter().map(|network| network.name.as_str()).collect();
    assert_eq!(names, ["vision", "cross", "decoder"]);
    let coverage = fixture.coverage(&networks);
    assert_eq!((coverage.missing, coverage.unused), (vec![], vec![]));
    assert_eq!((coverage.found.len(), coverage.ignored.len()), (134, 4));
    assert!(coverage.ignored.iter().all(|name| name.ends_with(".attention.self.relative_position_index")));
    // Without a head the embedding is the head.
    let names = fixture.names();
    let names = names.iter().map(String::as_str).filter(|name| !name.ends_with("lm_head.weight"));
    let coverage = cover(&fixture.model, &networks, names);
    assert_eq!((coverage.missing, coverage.unused), (vec![], vec![]));
    assert_eq!(coverage.found["decoder.lm_head.weight"], "decoder.model.decoder.embed_tokens.weight");
}

#[test]
fn window_biases_have_the_rows_that_the_file_says() {
    let fixture = open("nougat", &[]);
    let mut blocks = 0;
    for node in &fixture.networks(Logits::Last)[0].nodes {
        let Op::Attention(attention) = &node.op else { continue };
        let bias = attention.window_bias.as_ref().unwrap();
        let weight = bias.weight.key();
        let index = fixture.ints(&weight.replace("relative_position_bias_table", "relative_position_index"));
        let places = bias.places();
        let rows = (0..places).flat_map(|query| (0..places).map(move |key| bias.row(query, key) as i32));
        assert_eq!(rows.collect::<Vec<_>>(), index, "{weight}");
        blocks += 1;
    }
    assert_eq!(blocks, 4);
}

/// Feeds ids from position `past` on; gives the logits of each, or of the last.
fn step(
    decoder: &Interpreter,
    caches: &mut Caches,
    read: &BTreeMap<String, Array>,
    ids: &[i32],
    past: usize,
) -> Vec<f32> {
    let count = ids.len();
    let own = [
        ("input_ids", Array::int([1, count], ids.to_vec())),
        ("position_ids", Array::int([1, count], (past..past + count).map(|place| place as i32).collect())),
        ("past_lengths", Array::int([1], vec![past as i32])),
        ("sequence_lengths", Array::int([1], vec![(past + count) as i32])),
        ("last_token_ids", Array::int([1], vec![count as i32 - 1])),
    ];
    let mut inputs = read.clone();
    inputs.extend(own.map(|(name, array)| (name.to_owned(), array)));
    decoder.run(&inputs, caches, None).unwrap()["logits"].floats().unwrap().to_vec()
}

#[test]
fn all_networks_agree_with_transformers() {
    let fixture = open("nougat", &[]);
    let [vision, cross, decoder] = &fixture.interpreters(Logits::All)[..] else { panic!("three networks") };
    let facts = fixture.model.facts();
    let pictures = facts.pictures.unwrap();
    assert_eq!((pictures.size, pictures.features, pictures.entry), ([40, 36], 25, Entry::Source));
    let (features, _) = see(vision, Array::float([1, 3, 40, 36], fixture.golden("pixel_values")));
    let error = worst(&features, &fixture.golden("encoder_out"));
    assert!(error < 1e-4, "features: {error}");
    let seen = BTreeMap::from([("encoder_output", Array::float([1, 25, 32], features))]);
    let read = cross.run(&seen, &mut Caches::new(cross.network(), 1, 0), None).unwrap();
    let mut caches = Caches::new(decoder.network(), 1, 16);
    let found = step(decoder, &mut caches, &read, &fixture.golden_ints("decoder_input_ids"), 0);
    let error = worst(&found, &fixture.golden("logits"));
    assert!(error < 1e-4, "logits: {error}");
    // The golden's ids one by one.
    let generated = fixture.golden_ints("generated");
    let generated = generated.strip_prefix(&[facts.decoder_start_id.unwrap() as i32]).unwrap_or(&generated);
    assert_eq!(generated.len(), 8);
    let mut last = 0;
    let mut caches = Caches::new(decoder.network(), 1, 16);
    for (past, &wanted) in generated.iter().enumerate() {
        let logits = step(decoder, &mut caches, &read, &[last], past);
        last = (0..facts.vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as i32;
        assert_eq!(last, wanted, "token {past}");
    }
}

#[test]
fn one_layer_as_text() {
    let networks = open("nougat", &[]).model.networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("swin_block", lines(&networks[0], " encoder.encoder.layers.0.blocks.1."));
    insta::assert_snapshot!("swin_merge", lines(&networks[0], " encoder.encoder.layers.0.downsample."));
    insta::assert_snapshot!("mbart_cross", lines(&networks[1], " decoder.model.decoder.layers.1."));
    insta::assert_snapshot!("mbart_decoder_layer", lines(&networks[2], " decoder.model.decoder.layers.1."));
    let mbart = Model::from_config(&mbart(json!({}))).unwrap().networks(DType::Float16, Logits::Last).unwrap();
    insta::assert_snapshot!("mbart_encoder_layer", lines(&mbart[0], " model.encoder.layers.0."));
}

#[test]
fn networks_that_do_not_fit_are_refused() {
    let text = graphs::print(&open("nougat", &[]).networks(Logits::Last)[0]);
    graphs::verify(&graphs::parse(&text).unwrap()).unwrap();
    for (from, to, wanted) in [
        ("\"side\":4,", "\"side\":3,", "window bias"),
        ("\"side\":4,", "\"side\":0,", "window bias"),
        ("\"grid\":[3,3]", "\"grid\":[3,2]", "window bias"),
        ("\"shift\":2", "\"shift\":4", "window bias"),
        ("\"mask\":\"none\",\"window", "\"mask\":\"causal\",\"window", "window bias"),
        ("{\"axis\":1,\"by\":2}", "{\"axis\":1,\"by\":12}", "cannot roll axis 1"),
        ("{\"axis\":1,\"by\":2}", "{\"axis\":0,\"by\":2}", "cannot roll axis 0"),
    ] {
        assert!(text.contains(from), "{from}");
        let error = graphs::verify(&graphs::parse(&text.replacen(from, to, 1)).unwrap()).unwrap_err().to_string();
        assert!(error.contains(wanted), "{from} to {to}: {error}");
    }
}

/// Two texts of different lengths, sizes that differ between encoder and decoder, and a bias of the logits.
#[test]
fn mbart_agrees_with_transformers() {
    let fixture = open("mbart", &[]);
    let coverage = fixture.coverage(&fixture.networks(Logits::All));
    assert_eq!((coverage.missing, coverage.unused, coverage.ignored), (vec![], vec![], vec![]));
    assert_eq!(coverage.found["lm_head.weight"], "model.shared.weight");
    let [encoder, cross, decoder] = &fixture.interpreters(Logits::All)[..] else { panic!("three networks") };
    let lengths = Array::int([2], fixture.golden_ints("source_lengths"));
    let positions = |count: usize| Array::int([2, count], (0..count as i32).collect::<Vec<_>>().repeat(2));
    let inputs = BTreeMap::from([
        ("input_ids", Array::int([2, 6], fixture.golden_ints("input_ids"))),
        ("position_ids", positions(6)),
        ("source_lengths", lengths.clone()),
    ]);
    let none = &mut Caches::new(encoder.network(), 2, 0);
    let encoded = encoder.run(&inputs, none, None).unwrap();
    let error = worst(encoded["encoder_output"].floats().unwrap(), &fixture.golden("encoder_out"));
    assert!(error < 1e-4, "encoder: {error}");
    let mut inputs = cross.run(&encoded, none, None).unwrap();
    let own = [
        ("source_lengths", lengths),
        ("input_ids", Array::int([2, 3], fixture.golden_ints("decoder_input_ids"))),
        ("position_ids", positions(3)),
        ("past_lengths", Array::int([2], vec![0, 0])),
        ("sequence_lengths", Array::int([2], vec![3, 3])),
    ];
    inputs.extend(own.map(|(name, array)| (name.to_owned(), array)));
    let outputs = decoder.run(&inputs, &mut Caches::new(decoder.network(), 2, 3), None).unwrap();
    let error = worst(outputs["logits"].floats().unwrap(), &fixture.golden("logits"));
    assert!(error < 1e-4, "decoder: {error}");
}

fn mbart(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["MBartForConditionalGeneration"], "model_type": "mbart", "d_model": 32, "vocab_size": 64,
        "encoder_layers": 1, "encoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_layers": 2,
        "decoder_ffn_dim": 40, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

fn nougat(encoder: Value, decoder: Value) -> Value {
    let mut config = json!({
        "architectures": ["VisionEncoderDecoderModel"], "decoder": mbart(json!({})),
        "encoder": { "model_type": "donut-swin", "image_size": [40, 36], "patch_size": 4, "embed_dim": 16,
            "depths": [2, 2], "num_heads": [2, 4], "window_size": 4 },
    });
    for (part, changes) in [("encoder", encoder), ("decoder", decoder)] {
        config[part].as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    }
    config
}

#[test]
fn mbart_alone_has_the_networks_that_its_config_says() {
    let model = Model::from_config(&mbart(json!({ "decoder_start_token_id": 7 }))).unwrap();
    let networks = model.networks(DType::Float32, Logits::Last).unwrap();
    let names: Vec<&str> = networks.iter().map(|network| network.name.as_str()).collect();
    assert_eq!((names, model.facts().decoder_start_id), (vec!["encoder", "cross", "decoder"], Some(7)));
    // A hub file: the embedding under its shared name alone, or under the stacks' names too, tied to the head.
    let weights: Vec<String> = networks
        .iter()
        .flat_map(graphs::Network::weights)
        .flat_map(|(_, weight)| weight.tensors().into_iter().map(|(name, _)| name.to_owned()).collect::<Vec<_>>())
        .collect();
    let tied = weights.iter().map(String::as_str).filter(|name| *name != "lm_head.weight");
    let copies = ["model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"];
    let coverage = cover(&model, &networks, tied.clone().chain(copies));
    assert_eq!((coverage.missing, coverage.unused), (vec![], vec![]));
    assert_eq!(
        (coverage.found["lm_head.weight"].as_str(), &coverage.ignored[..]),
        ("model.shared.weight", &copies.map(str::to_owned)[..])
    );
    let coverage = cover(&model, &networks, tied.filter(|name| *name != "model.shared.weight").chain(copies));
    assert_eq!(coverage.missing, Vec::<String>::new());
    // The decoder alone attends to nothing else, whatever its file holds.
    let model = Model::from_config(&mbart(json!({ "architectures": ["MBartForCausalLM"] }))).unwrap();
    let networks = model.networks(DType::Float32, Logits::Last).unwrap();
    assert_eq!((networks.len(), networks[0].name.as_str(), model.facts().decoder_start_id), (1, "language", None));
    let extra =
        ["model.decoder.layers.0.encoder_attn.q_proj.weight", "model.decoder.layers.1.encoder_attn_layer_norm.bias"];
    let own = weights
        .iter()
        .map(String::as_str)
        .filter(|name| name.starts_with("model.decoder.") && !name.contains("encoder_attn"));
    let coverage = cover(&model, &networks, own.chain(copies[..1].iter().copied()).chain(extra));
    assert_eq!((coverage.missing, coverage.unused), (vec![], vec![]));
    assert_eq!(coverage.ignored, extra);
}

/// What pads a text must not change it, and a token more at a time must give what all at once gave.
#[test]
fn mbart_reads_texts_of_different_lengths() {
    let model = Model::from_config(&mbart(json!({ "scale_embedding": true }))).unwrap();
    let networks = model.networks(DType::Float32, Logits::All).unwrap();
    let [encoder, cross, decoder] =
        &networks.into_iter().map(|n| Interpreter::new(n, &Drawn).unwrap()).collect::<Vec<_>>()[..]
    else {
        panic!("three networks")
    };
    let read = |ids: &[i32], length: i32| {
        let lengths = Array::int([1], vec![length]);
        let inputs = BTreeMap::from([
            ("input_ids", Array::int([1, ids.len()], ids.to_vec())),
            ("position_ids", Array::int([1, ids.len()], (0..ids.len() as i32).collect())),
            ("source_lengths", lengths.clone()),
        ]);
        let none = &mut Caches::new(encoder.network(), 1, 0);
        let mut read = cross.run(&encoder.run(&inputs, none, None).unwrap(), none, None).unwrap();
        read.insert("source_lengths".into(), lengths);
        read
    };
    let logits = |read: &BTreeMap<String, Array>, parts: &[&[i32]]| {
        let (mut caches, mut past, mut all) = (Caches::new(decoder.network(), 1, 8), 0, Vec::new());
        for part in parts {
            all.extend(step(decoder, &mut caches, read, part, past));
            past += part.len();
        }
        all
    };
    let (short, long) = (read(&[5, 9, 2], 3), read(&[5, 9, 2, 1, 33], 3));
    let wanted = logits(&short, &[&[7, 8, 9]]);
    assert!(worst(&wanted, &logits(&long, &[&[7, 8, 9]])) < 1e-5);
    assert!(worst(&wanted, &logits(&short, &[&[7], &[8, 9]])) < 1e-5);
    let other = logits(&read(&[5, 9, 2, 1, 33], 5), &[&[7, 8, 9]]);
    assert!(worst(&wanted, &other) > 1e-2, "the text matters");
}

#[test]
fn configs_are_read_whole() {
    let paths = |encoder: Value, decoder: Value| -> Vec<String> {
        let model = Model::from_config(&nougat(encoder, decoder)).unwrap();
        let networks = model.networks(DType::Float32, Logits::Last).unwrap();
        networks.iter().flat_map(|network| network.nodes.iter().map(|node| node.path.clone())).collect()
    };
    let has = |paths: &[String], part: &str| paths.iter().any(|path| path.contains(part));
    let usual = paths(json!({}), json!({}));
    assert!(
        has(&usual, "attention.self.query.bias")
            && !has(&usual, "enc_to_dec_proj")
            && !has(&usual, "embed_tokens/scale")
    );
    let other = paths(json!({ "qkv_bias": false, "embed_dim": 32 }), json!({ "scale_embedding": true }));
    assert!(
        !has(&other, "attention.self.query.bias")
            && has(&other, "enc_to_dec_proj")
            && has(&other, "embed_tokens/scale")
    );
    // Pages that are no multiple of a patch, windows as wide as the grid, and starting ids in each place.
    let model = |encoder: Value, changes: Value| {
        let mut config = nougat(encoder, json!({ "bos_token_id": 3 }));
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Model::from_config(&config).unwrap()
    };
    let facts = model(json!({ "image_size": [41, 38] }), json!({})).facts();
    assert_eq!((facts.pictures.unwrap().features, facts.decoder_start_id), (6 * 5, Some(3)));
    assert_eq!(model(json!({}), json!({ "decoder_start_token_id": 5 })).facts().decoder_start_id, Some(5));
    let networks = model(json!({ "image_size": 20, "window_size": 5, "depths": [2], "num_heads": [2] }), json!({}));
    let networks = networks.networks(DType::Float32, Logits::Last).unwrap();
    let shifts = networks[0].nodes.iter().filter_map(|node| match &node.op {
        Op::Attention(attention) => Some(attention.window_bias.as_ref()?.shift),
        _ => None,
    });
    assert_eq!(shifts.collect::<Vec<_>>(), [0, 0]);
}

#[test]
fn configs_that_do_not_fit_are_refused() {
    for (encoder, decoder, wanted) in [
        (json!({ "model_type": "swin" }), json!({}), "encoder.model_type"),
        (json!({}), json!({ "model_type": "bart" }), "decoder.model_type"),
        (json!({ "image_size": [40] }), json!({}), "encoder.image_size"),
        (json!({ "image_size": [3, 36] }), json!({}), "encoder.image_size"),
        (json!({ "image_size": [1 << 20, 1 << 20] }), json!({}), "encoder.image_size"),
        (json!({ "patch_size": [4, 2] }), json!({}), "encoder.patch_size"),
        (json!({ "depths": [] }), json!({}), "encoder.depths"),
        (json!({ "depths": 2 }), json!({}), "encoder.depths"),
        (json!({ "num_heads": [2] }), json!({}), "encoder.num_heads"),
        (json!({ "num_heads": [2, 5] }), json!({}), "encoder.num_heads"),
        (json!({ "embed_dim": 1 << 22 }), json!({}), "encoder.embed_dim"),
        (json!({ "mlp_ratio": 1e-3 }), json!({}), "encoder.mlp_ratio"),
        (json!({ "window_size": 6 }), json!({}), "encoder.window_size"),
        (json!({ "use_absolute_embeddings": true }), json!({}), "encoder.use_absolute_embeddings"),
        (json!({ "hidden_act": "sine" }), json!({}), "encoder.hidden_act"),
        (json!({}), json!({ "decoder_attention_heads": 5 }), "decoder.decoder_attention_heads"),
        (json!({}), json!({ "decoder_start_token_id": -1 }), "decoder.decoder_start_token_id"),
        (json!({}), json!({ "activation_function": "sine" }), "decoder.activation_function"),
    ] {
        let error = Model::from_config(&nougat(encoder, decoder)).unwrap_err().to_string();
        assert!(error.contains(&format!("`{wanted}`")), "{wanted}: {error}");
    }
}
