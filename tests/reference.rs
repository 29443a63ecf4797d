//! `build` and `run` on the reference target, through the binary.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::DType;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::Path;

/// The golden's picture as a PNG, its prompt and its ids.
fn golden(name: &str, folder: &Path) -> (String, String, Vec<u64>) {
    let bytes = std::fs::read(fixture(name).join("golden.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let prompt = metadata.metadata().as_ref().unwrap()["prompt"].clone();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let picture = file.tensor("image_u8").unwrap();
    let (height, width) = (picture.shape()[0] as u32, picture.shape()[1] as u32);
    let path = folder.join("golden.png");
    image::RgbImage::from_raw(width, height, picture.data().to_vec()).unwrap().save(&path).unwrap();
    let ids = file.tensor("generated").unwrap();
    let ids = ids.data().chunks_exact(8).map(|id| u64::from_le_bytes(id.try_into().unwrap())).collect();
    (path.display().to_string(), prompt, ids)
}

#[test]
fn llava_generates_what_transformers_generates() {
    let root = tempfile::tempdir().unwrap();
    for name in ["llava-hf", "llava-v4names", "llava-v5names"] {
        let (picture, prompt, wanted) = golden(name, root.path());
        let output = root.path().join(name);
        build_reference(&fixture(name), &output, &["--max-batch-size", "2"]);
        let count = wanted.len().to_string();
        let found = run(&output, &["--image", &picture, "--prompt", &prompt, "--max-new-tokens", &count]);
        assert_eq!(ids(&found[0]), wanted, "{name}");
        // Another prompt of another length beside it, with the same picture, changes nothing; nor does the order.
        let pair = ["--image", &picture, &picture, "--prompt", "Why?", &prompt, "--max-new-tokens", &count];
        let found = run(&output, &pair);
        assert_eq!(ids(&found[1]), wanted, "{name} in a batch");
        let alone = run(&output, &["--image", &picture, "--prompt", "Why?", "--max-new-tokens", &count]);
        assert_eq!(ids(&found[0]), ids(&alone[0]), "{name}, the other");
    }
}

#[test]
fn blip2_generates_what_transformers_generates() {
    for (name, network, positions) in
        [("blip2-opt", "language", "learned_absolute"), ("blip2-t5", "decoder", "relative")]
    {
        blip2_generates(name, network, positions);
    }
}

fn blip2_generates(name: &str, network: &str, positions: &str) {
    let root = tempfile::tempdir().unwrap();
    let (picture, prompt, wanted) = golden(name, root.path());
    let output = root.path().join("engines");
    build_reference(&fixture(name), &output, &["--max-batch-size", "2"]);
    let count = wanted.len().to_string();
    let ask = |pictures: &[&str], prompts: &[&str]| {
        let all = [&["--image"], pictures, &["--prompt"], prompts, &["--max-new-tokens", &count]].concat();
        run(&output, &all).iter().map(ids).collect::<Vec<_>>()
    };
    assert_eq!(ask(&[&picture], &[&prompt])[0], wanted);
    // Two pictures and two prompts of different lengths in one call, each as alone, in either order.
    let other = root.path().join("other.png");
    image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([(x * 6) as u8, (y * 8) as u8, 99])).save(&other).unwrap();
    let other = other.display().to_string();
    let alone = ask(&[&other], &["Why?"])[0].clone();
    assert_ne!(alone, ask(&[&picture], &["Why?"])[0], "the picture matters");
    assert_eq!(ask(&[&other, &picture], &["Why?", &prompt]), [&alone[..], &wanted]);
    assert_eq!(ask(&[&picture, &other], &[&prompt, "Why?"]), [&wanted[..], &alone]);
    // No words at all: a caption.
    assert!(!ask(&[&picture], &[""])[0].is_empty());
    let (code, text) = refuse(&["run", output.to_str().unwrap(), "--image", &picture, "--prompt", "<image> Why?"]);
    assert!(code == 1 && text.contains("wanted none: pictures come before the whole prompt"), "{text}");
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(output.join(network).join("config.json")).unwrap()).unwrap();
    let config = &config["pretrained_config"];
    assert_eq!(config["architecture"], json!("Blip2ForConditionalGeneration"));
    assert_eq!(config["position_embedding_type"], json!(positions));
    assert_eq!(config["multimodal"]["prompt_template"], json!("blip2"));
}

/// As for OPT below: the encoder and decoder alone say what they say inside of BLIP-2 without a picture.
#[test]
fn t5_runs_alone() {
    let root = tempfile::tempdir().unwrap();
    let (whole, alone) = (root.path().join("whole"), root.path().join("t5"));
    build_reference(&fixture("blip2-t5"), &whole, &["--max-batch-size", "2"]);
    language_alone("blip2-t5", &alone);
    let output = root.path().join("alone");
    build_reference(&alone, &output, &["--max-batch-size", "2"]);
    let ask = |output: &Path| {
        let both = run(output, &["--prompt", "a photo of a cat", "Why?", "--max-new-tokens", "6"]);
        let one = run(output, &["--prompt", "Why?", "--max-new-tokens", "6"]);
        assert_eq!(ids(&both[1]), ids(&one[0]), "a batch");
        both.iter().map(ids).collect::<Vec<_>>()
    };
    assert_eq!(ask(&whole), ask(&output));
    let quantized = root.path().join("quantized");
    build_reference(&alone, &quantized, &["--quant", "int4-g16"]);
    let names: Vec<_> = ["encoder", "cross", "decoder"].map(|name| quantized.join(name).join("network.txt")).to_vec();
    assert!(names.iter().all(|path| std::fs::read_to_string(path).unwrap().contains("int4")));
}

/// The language part of the fixture as a checkpoint of its own gives what it gives inside of BLIP-2 without a picture; with
/// norms behind and an embedding of another width it runs too.
#[test]
fn opt_runs_alone() {
    let root = tempfile::tempdir().unwrap();
    let whole = root.path().join("whole");
    build_reference(&fixture("blip2-opt"), &whole, &["--dtype", "float32"]);
    let ask = |output: &Path| ids(&run(output, &["--prompt", "a photo of a cat", "--max-new-tokens", "6"])[0]);
    let alone = root.path().join("opt");
    language_alone("blip2-opt", &alone);
    let output = root.path().join("alone");
    build_reference(&alone, &output, &["--dtype", "float32"]);
    assert_eq!(ask(&whole), ask(&output));
    for (number, changes) in [
        json!({ "do_layer_norm_before": false, "word_embed_proj_dim": 48 }),
        json!({ "enable_bias": false, "tie_word_embeddings": false, "activation_function": "gelu" }),
    ]
    .into_iter()
    .enumerate()
    {
        let config = opt_config(changes);
        let one = answer(root.path(), &format!("opt-{number}"), &config, &random_tensors(&config), DType::Float32, 2);
        assert_eq!(one.len(), 12);
    }
}

/// The vision part in one folder and OPT in another give what the whole checkpoint gives; the whole's own language part is
/// then left alone, and what does not fit is refused.
#[test]
fn the_language_part_may_lie_apart() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    let (picture, prompt, wanted) = golden("blip2-opt", root.path());
    let opt = path("opt");
    language_alone("blip2-opt", &opt);
    part_of("blip2-opt", &path("vision"), |name| (!name.starts_with("language_model.")).then_some(name));
    for name in ["preprocessor_config.json", "processor_config.json", "config.json", "generation_config.json"] {
        std::fs::copy(fixture("blip2-opt").join(name), path("vision").join(name)).unwrap();
    }
    let count = wanted.len().to_string();
    for (number, vision) in [path("vision"), fixture("blip2-opt")].iter().enumerate() {
        let output = path(&format!("engines-{number}"));
        build_reference(vision, &output, &["--language", &text("opt")]);
        let found = run(&output, &["--image", &picture, "--prompt", &prompt, "--max-new-tokens", &count]);
        assert_eq!(ids(&found[0]), wanted);
        let manifest = String::from_utf8(std::fs::read(output.join("manifest.json")).unwrap()).unwrap();
        assert!(manifest.contains("--language opt"), "{manifest}");
    }
    let (whole, llava) = (fixture("blip2-opt").display().to_string(), fixture("llava-hf").display().to_string());
    for (name, changes) in [("wide", json!({})), ("words", json!({ "hidden_size": 48, "vocab_size": 600 }))] {
        let config = opt_config(changes);
        write_checkpoint(&path(name), &config, &random_tensors(&config), DType::Float32, 1);
    }
    for (model, language, wanted) in [
        (&whole, text("wide"), "`hidden_size`: the pictures come as 48, the language model has 64"),
        (&whole, text("words"), "`vocab_size`: the tokens are of 336, the language model has 600"),
        (&whole, llava.clone(), "`llava` cannot be the language part of `blip-2`"),
        (&llava, text("opt"), "`opt` cannot be the language part of `llava`"),
        (&text("vision"), String::new(), "tensor `language_model.model.decoder.embed_positions.weight` is missing"),
    ] {
        let flags = ["plan", model, "--language", &language];
        let (code, text) = refuse(if language.is_empty() { &flags[..2] } else { &flags });
        assert!(code == 1 && text.contains(wanted), "{code} {text}");
    }
}

#[test]
fn two_builds_are_equal_byte_for_byte() {
    let root = tempfile::tempdir().unwrap();
    let (first, second) = (root.path().join("a"), root.path().join("with a longer name"));
    for output in [&first, &second] {
        build_reference(&fixture("llava-hf"), output, &["--quant", "int4-g16", "--vision-quant", "int8"]);
    }
    assert_eq!(contents(&first), contents(&second));
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2, "nothing else is left behind");
    succeed(&["inspect", first.to_str().unwrap()]);
}

/// Greedy ids of a text prompt under a config and its tensors.
fn answer(
    root: &Path,
    name: &str,
    config: &serde_json::Value,
    tensors: &Tensors,
    dtype: DType,
    shards: usize,
) -> Vec<u64> {
    let (checkpoint, output) = (root.join(format!("{name}-checkpoint")), root.join(name));
    write_checkpoint(&checkpoint, config, tensors, dtype, shards);
    build_reference(&checkpoint, &output, &["--dtype", "float32"]);
    ids(&run(&output, &["--prompt", "What is shown in the image?", "--max-new-tokens", "12"])[0])
}

#[test]
fn grouped_heads_equal_the_same_heads_repeated() {
    let root = tempfile::tempdir().unwrap();
    let grouped = llama_config(json!({ "num_key_value_heads": 2, "head_dim": 24, "rope_theta": 500000.0 }));
    let tensors = random_tensors(&grouped);
    let full = llama_config(json!({ "num_key_value_heads": 4, "head_dim": 24, "rope_parameters": {
        "rope_theta": 500000.0, "rope_type": "default" } }));
    let mut repeated = tensors.clone();
    for (name, (shape, values)) in &mut repeated {
        if name.contains("k_proj") || name.contains("v_proj") {
            let head = values.len() / 2;
            *values = values.chunks(head).flat_map(|head| [head, head].concat()).collect();
            shape[0] *= 2;
        }
    }
    let one = answer(root.path(), "grouped", &grouped, &tensors, DType::Float32, 1);
    let other = answer(root.path(), "repeated", &full, &repeated, DType::Float32, 3);
    assert_eq!(one, other);
    assert!(one.iter().collect::<std::collections::BTreeSet<_>>().len() > 3, "the answer says something: {one:?}");
}

#[test]
fn tied_heads_equal_a_head_that_repeats_the_embedding() {
    let root = tempfile::tempdir().unwrap();
    let tied = llama_config(json!({ "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true }));
    let tensors = random_tensors(&tied);
    assert!(!tensors.contains_key("lm_head.weight"));
    let untied = llama_config(json!({ "tie_word_embeddings": false, "attention_bias": true, "mlp_bias": true }));
    let mut both = tensors.clone();
    both.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    let one = answer(root.path(), "tied", &tied, &tensors, DType::Float32, 1);
    assert_eq!(one, answer(root.path(), "untied", &untied, &both, DType::Float32, 1));
    // Files may hold the tied head all the same.
    assert_eq!(one, answer(root.path(), "tied-twice", &tied, &both, DType::Float32, 1));
}

/// Features with the class token, several hidden states joined, a projector without biases: built, run, and answers about
/// two pictures in one prompt are other answers.
#[test]
fn other_ways_to_pick_features_run() {
    let root = tempfile::tempdir().unwrap();
    let config = llava_config(json!({
        "vision_feature_select_strategy": "full", "vision_feature_layer": [-2, -1, 0], "multimodal_projector_bias": false,
    }));
    let tensors = random_tensors(&config);
    assert_eq!(tensors["multi_modal_projector.linear_1.weight"].0, [64, 120]);
    assert!(!tensors.contains_key("multi_modal_projector.linear_1.bias"));
    let (checkpoint, output) = (root.path().join("checkpoint"), root.path().join("engines"));
    write_checkpoint(&checkpoint, &config, &tensors, DType::Bfloat16, 2);
    build_reference(&checkpoint, &output, &["--max-multimodal-len", "34", "--max-input-len", "64", "--quant", "int8"]);
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(output.join("language/config.json")).unwrap()).unwrap();
    assert_eq!(config["pretrained_config"]["multimodal"]["num_visual_features"], json!(17));
    let (picture, _, _) = golden("llava-hf", root.path());
    let black = root.path().join("black.png");
    image::RgbImage::new(40, 30).save(&black).unwrap();
    let black = black.display().to_string();
    let ask = |pictures: &[&str], prompt: &str| {
        let arguments = [&["--image"], pictures, &["--prompt", prompt, "--max-new-tokens", "8"]].concat();
        ids(&run(&output, &arguments)[0])
    };
    let one = ask(&[&picture], "<image> Why?");
    assert_eq!(one, ask(&[&picture], "<image> Why?"));
    assert_ne!(one, ask(&[&black], "<image> Why?"));
    let two = ask(&[&picture, &black], "<image> or <image>?");
    assert_ne!(two, ask(&[&black, &picture], "<image> or <image>?"));
}

#[test]
fn half_precision_files_are_read() {
    let root = tempfile::tempdir().unwrap();
    let config = llama_config(json!({}));
    let rounded = |dtype: DType| {
        let mut tensors = random_tensors(&config);
        for value in tensors.values_mut().flat_map(|(_, values)| values) {
            *value = match dtype {
                DType::Float16 => half::f16::from_f32(*value).to_f32(),
                _ => half::bf16::from_f32(*value).to_f32(),
            };
        }
        tensors
    };
    for dtype in [DType::Float16, DType::Bfloat16] {
        let tensors = rounded(dtype);
        let half = answer(root.path(), &format!("half-{dtype}"), &config, &tensors, dtype, 2);
        let full = answer(root.path(), &format!("full-{dtype}"), &config, &tensors, DType::Float32, 1);
        assert_eq!(half, full, "{dtype}");
    }
}

#[test]
fn an_answer_ends_where_it_must() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("engines");
    build_reference(&fixture("llava-hf"), &output, &["--max-input-len", "24", "--max-output-len", "5"]);
    let found = run(&output, &["--prompt", "Hello"]);
    assert_eq!((ids(&found[0]).len(), &found[0]["finish_reason"]), (5, &json!("length")));
    assert!(ids(&run(&output, &["--prompt", "Hello", "--max-new-tokens", "0"])[0]).is_empty());
    let directory = output.to_str().unwrap();
    let long = "word ".repeat(60);
    for (arguments, wanted) in [
        (&["--prompt", "Hello", "--max-new-tokens", "6"][..], "6 new tokens were asked for, the engine makes 5"),
        (&["--prompt", &long][..], "prompt"),
        (&["--prompt", ""][..], "prompt"),
        (&["--prompt", "<image> <image>", "--image", "nowhere.png"][..], "cannot read `nowhere.png`"),
        (&["--prompt", "a", "--chat"][..], "the checkpoint has no chat template"),
        (&["--prompt", "a", "--target", "rtx"][..], "engines of TensorRT-RTX cannot be run yet"),
        (&["--prompt", "a", "--target", "tensorrt"][..], "was not built for target `tensorrt`, only for reference"),
    ] {
        let (code, text) = refuse(&[&["run", directory], arguments].concat());
        assert!(code == 1 && text.contains(wanted), "{arguments:?}: {code} {text}");
    }
}

#[test]
fn a_changed_file_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("engines");
    build_reference(&fixture("llava-hf"), &output, &[]);
    let weights = output.join("language/weights.safetensors");
    let mut content = std::fs::read(&weights).unwrap();
    *content.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, content).unwrap();
    let (code, text) = refuse(&["run", output.to_str().unwrap(), "--prompt", "Hello"]);
    assert!(code == 1 && text.contains("was changed: wanted") && text.contains("build the directory again"), "{text}");
}

/// In float32 only INT8 inputs feel the last bits, and what ties cost there widens `verify`'s bound.
#[test]
fn verify_counts_ties_of_int8_inputs() {
    let root = tempfile::tempdir().unwrap();
    let rounding = |flags: &[&str]| -> Vec<(f64, f64)> {
        let output = root.path().join(format!("engines-{}", flags.len()));
        build_reference(&fixture("llava-hf"), &output, &[&["--dtype", "float32"], flags].concat());
        let found = succeed(&["verify", output.to_str().unwrap(), "--target", "reference", "--json", "-q"]).stdout;
        let found: Value = serde_json::from_slice(&found).unwrap();
        assert_eq!(found["passed"], true);
        let number = |one: &Value, name: &str| one[name].as_f64().unwrap();
        let all = found["comparisons"].as_array().unwrap().iter();
        all.map(|one| (number(one, "rounding_error"), number(one, "bound"))).collect()
    };
    assert!(rounding(&[]).iter().all(|found| *found == (0.0, 1e-3)));
    let tokens = rounding(&["--quant", "int8-absmax-token", "--vision-quant", "int8-absmax-token"]);
    for (rounding, bound) in tokens {
        assert!(rounding > 0.0 && rounding < 0.1 && bound >= (3.0 * rounding).max(2e-2), "{rounding} {bound}");
    }
}
