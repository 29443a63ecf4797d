//! Nougat and mBART through the binary on the reference: pages and texts in, answers out.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::DType;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::Path;
use trtvlm::engine_dir::EngineDirectory;
use trtvlm::processor::{Picture, Processor};
use trtvlm::runtime::{Executor, Reference};

const NAME: &str = "nougat";

fn golden() -> Vec<u8> {
    std::fs::read(fixture(NAME).join("golden.safetensors")).unwrap()
}

/// The golden's page and what is generated of it, without the token that the decoder starts with. Behind it the end,
/// which the generation config puts in the place of the last token and the golden was made without.
fn page(folder: &Path) -> (String, Vec<u64>) {
    let bytes = golden();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let picture = file.tensor("image_u8").unwrap();
    let (height, width) = (picture.shape()[0] as u32, picture.shape()[1] as u32);
    let path = folder.join("page.png");
    image::RgbImage::from_raw(width, height, picture.data().to_vec()).unwrap().save(&path).unwrap();
    let ids = file.tensor("generated").unwrap();
    let ids: Vec<u64> = ids.data().as_chunks::<8>().0.iter().map(|id| u64::from_le_bytes(*id)).collect();
    (path.display().to_string(), [ids.strip_prefix(&[0]).unwrap_or(&ids), &[2]].concat())
}

/// Another page: print in a part of it.
fn other(folder: &Path, name: &str, step: u32) -> String {
    let ink = |x: u32, y: u32| if x > 9 && y < 50 && (x / 3 + y / 5).is_multiple_of(step) { 20 } else { 250 };
    let path = folder.join(name);
    image::RgbImage::from_fn(70, 90, |x, y| image::Rgb([ink(x, y); 3])).save(&path).unwrap();
    path.display().to_string()
}

#[test]
fn pixels_equal_the_golden() {
    let bytes = golden();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let picture = file.tensor("image_u8").unwrap();
    let (height, width) = (picture.shape()[0], picture.shape()[1]);
    let picture = Picture::from_rgb(width, height, picture.data().to_vec()).unwrap();
    let processor = Processor::open(&fixture(NAME)).unwrap();
    assert_eq!((processor.text.eos_ids(), processor.generation.max_length), (&[2][..], Some(64)));
    let values = processor.image.unwrap().process(&picture).unwrap();
    let wanted = file.tensor("pixel_values").unwrap().data();
    let wanted: Vec<f32> = wanted.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert_eq!(values, wanted);
}

#[test]
fn nougat_generates_what_transformers_generates() {
    let root = tempfile::tempdir().unwrap();
    let (first, wanted) = page(root.path());
    let output = root.path().join("engines");
    build_reference(&fixture(NAME), &output, &["--max-batch-size", "3"]);
    let count = wanted.len().to_string();
    let ask = |pages: &[&str]| -> Vec<Vec<u64>> {
        let found = run(&output, &[&["--image"], pages, &["--max-new-tokens", &count]].concat());
        found.iter().map(ids).collect()
    };
    assert_eq!(ask(&[&first]), [&wanted[..]]);
    // Pages beside it change nothing, wherever they are, also where they do not all fit into one call.
    let (second, third) = (other(root.path(), "second.png", 2), other(root.path(), "third.png", 3));
    let (two, three) = (ask(&[&second]).remove(0), ask(&[&third]).remove(0));
    assert!(two != wanted && three != wanted, "the page matters");
    assert_eq!(ask(&[&second, &first, &third]), [&two[..], &wanted, &three]);
    assert_eq!(ask(&[&first, &third, &second, &first]), [&wanted[..], &three, &two, &wanted]);
    // An empty prompt is none. Nothing asked for: as long as the checkpoint says, the starting token included.
    let found = run(&output, &["--image", &first, "--prompt", "", "--max-new-tokens", &count]);
    assert_eq!(ids(&found[0]), wanted);
    let found = run(&output, &["--image", &first]);
    assert_eq!((ids(&found[0]).len(), &found[0]["finish_reason"]), (63, &json!("length")));

    let directory = output.to_str().unwrap();
    for (arguments, wanted) in [
        (&["--image", &first, "--prompt", "Read this"][..], "the prompt `Read this` was given"),
        (&["--prompt", ""][..], "a request has 0 pictures, this model reads exactly one"),
        (&["--image", &first, "--chat"][..], "the checkpoint has no chat template"),
        (&["--image", &first, "--max-new-tokens", "65"][..], "the engine makes 64"),
    ] {
        let (code, text) = refuse(&[&["run", directory], arguments].concat());
        assert!(code == 1 && text.contains(wanted), "{arguments:?}: {code} {text}");
    }
    let config: Value = serde_json::from_slice(&std::fs::read(output.join("decoder/config.json")).unwrap()).unwrap();
    let (model, sizes) = (&config["pretrained_config"], &config["build_config"]);
    assert_eq!(model["architecture"], json!("VisionEncoderDecoderModel"));
    assert_eq!((&model["decoder_start_token_id"], &model["multimodal"]["entry"]), (&json!(0), &json!("source")));
    assert_eq!((&model["multimodal"]["num_visual_features"], &sizes["max_seq_len"]), (&json!(25), &json!(64)));
    let manifest: Value = serde_json::from_slice(&std::fs::read(output.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["networks"], json!(["vision", "cross", "decoder"]));
}

/// What transformers' processors of scores make of a greedy answer to one page: one after the other, each token by itself.
fn naive(directory: &Path, picture: &Picture, rules: &Value, count: usize) -> Vec<u64> {
    let directory = EngineDirectory::open(directory).unwrap();
    let pixels = Processor::open(&directory.processor()).unwrap().image.unwrap().process(picture).unwrap();
    let mut executor = Reference::open(&directory).unwrap();
    let listed = |key: &str| rules[key].as_array().into_iter().flatten().map(|id| id.as_u64().unwrap() as usize);
    let start = rules["decoder_start_token_id"].as_i64().unwrap_or(0) as i32;
    executor.see(&pixels, 1).unwrap();
    executor.prefill(&[vec![start]]).unwrap();
    let mut found = Vec::new();
    loop {
        let mut scores = executor.outputs().unwrap()["logits"].values.clone();
        let read = found.len() + 1;
        let mut force = |id: &Value| {
            scores.fill(f32::NEG_INFINITY);
            scores[id.as_u64().unwrap() as usize] = 0.0;
        };
        if read == 1 && rules["forced_bos_token_id"].is_u64() {
            force(&rules["forced_bos_token_id"]);
        }
        if read == count && rules["forced_eos_token_id"].is_u64() {
            force(&rules["forced_eos_token_id"]);
        }
        let begin = if rules["forced_bos_token_id"].is_u64() { 2 } else { 1 };
        let never = listed("suppress_tokens").chain(listed("begin_suppress_tokens").filter(|_| read == begin));
        never.for_each(|id| scores[id] = f32::NEG_INFINITY);
        let best = (0..scores.len()).rev().max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
        found.push(best as u64);
        if best == 2 || found.len() == count {
            return found;
        }
        executor.force(&[best as u32]).unwrap();
        executor.decode(1).unwrap();
    }
}

#[test]
fn generation_configs_are_followed() {
    let root = tempfile::tempdir().unwrap();
    let (first, plain) = page(root.path());
    let second = other(root.path(), "second.png", 2);
    let pictures = [&first, &second].map(|path| Picture::open(Path::new(path)).unwrap());
    let (checkpoint, output) = (root.path().join("checkpoint"), root.path().join("engines"));
    copy_folder(&fixture(NAME), &checkpoint);
    let mut answers = Vec::new();
    for rules in [
        json!({}),
        json!({ "forced_bos_token_id": 7, "forced_eos_token_id": [9, 2] }),
        json!({ "suppress_tokens": [plain[0], 5], "forced_eos_token_id": 2 }),
        json!({ "begin_suppress_tokens": [plain[0]], "suppress_tokens": [] }),
        json!({ "forced_bos_token_id": 7, "begin_suppress_tokens": [plain[0]], "decoder_start_token_id": 3 }),
    ] {
        edit_json(&checkpoint.join("generation_config.json"), |file| {
            *file = json!({ "eos_token_id": 2, "max_length": 64 });
            file.as_object_mut().unwrap().extend(rules.as_object().unwrap().clone());
        });
        build_reference(&checkpoint, &output, &["--max-batch-size", "2"]);
        let naive_rules = match rules["forced_eos_token_id"].is_array() {
            // Of equal scores the first.
            true => json!({ "forced_bos_token_id": 7, "forced_eos_token_id": 2 }),
            false => rules.clone(),
        };
        let wanted = pictures.each_ref().map(|picture| naive(&output, picture, &naive_rules, 6));
        let found = run(&output, &["--image", &first, &second, "--max-new-tokens", "6"]);
        assert_eq!(found.iter().map(ids).collect::<Vec<_>>(), wanted, "{rules}");
        answers.extend(wanted);
    }
    let different: std::collections::BTreeSet<_> = answers.iter().step_by(2).collect();
    assert!(different.len() == 5, "every rule matters: {answers:?}");

    for (rules, wanted) in [
        (json!({ "suppress_tokens": [320] }), "token id `320` is outside the vocabulary of `320`"),
        (json!({ "suppress_tokens": "x" }), "`suppress_tokens` in generation_config.json: found `\"x\"`"),
        (json!({ "forced_bos_token_id": [1, 2] }), "`forced_bos_token_id` in generation_config.json: found `[1,2]`"),
    ] {
        edit_json(&checkpoint.join("generation_config.json"), |file| *file = rules.clone());
        build_reference(&checkpoint, &output, &[]);
        let (code, text) = refuse(&["run", output.to_str().unwrap(), "--image", &first]);
        assert!(code == 1 && text.contains(wanted), "{rules}: {code} {text}");
    }
    for (id, wanted) in [
        (json!(320), "token id `320` is outside the vocabulary of `320`"),
        (json!([0, 0]), "found `[0,0]` in generation_config.json, wanted one id"),
    ] {
        edit_json(&checkpoint.join("generation_config.json"), |file| *file = json!({ "decoder_start_token_id": id }));
        let (code, text) = refuse(&["plan", checkpoint.to_str().unwrap()]);
        assert!(code == 1 && text.contains(wanted) && text.contains("decoder_start_token_id"), "{code} {text}");
    }
}

/// Matrices of 16 and 32 inputs, in groups of 16, one for each output, and as whole bytes.
#[test]
fn every_matrix_can_be_quantized() {
    let root = tempfile::tempdir().unwrap();
    let (first, wanted) = page(root.path());
    let (second, count) = (other(root.path(), "second.png", 2), wanted.len().to_string());
    for quant in ["int8", "int4-g16", "int4-channel"] {
        let output = root.path().join(quant);
        build_reference(&fixture(NAME), &output, &["--quant", quant, "--vision-quant", quant, "--max-batch-size", "2"]);
        let ask = |pages: &[&str]| -> Vec<Vec<u64>> {
            run(&output, &[&["--image"], pages, &["--max-new-tokens", &count]].concat()).iter().map(ids).collect()
        };
        let alone = [ask(&[&first]).remove(0), ask(&[&second]).remove(0)];
        assert_eq!(ask(&[&first, &second]), alone, "{quant}");
        if quant == "int8" {
            assert_eq!(alone[0][..2], wanted[..2], "one byte a weight hardly changes anything");
        }
        let text = std::fs::read_to_string(output.join("vision/network.txt")).unwrap();
        let linears = text.lines().filter(|line| line.contains(" = linear(")).collect::<Vec<_>>();
        assert!(linears.len() == 25 && linears.iter().all(|line| line.contains("\"packed\"")), "{}", linears.len());
    }
}

/// A synthetic checkpoint has all that a run needs.
#[test]
fn synthetic_pages_are_read() {
    let root = tempfile::tempdir().unwrap();
    let (checkpoint, output) = (root.path().join("checkpoint"), root.path().join("engines"));
    let config = fixture(NAME).join("config.json").display().to_string();
    succeed(&["synth", &config, "-o", checkpoint.to_str().unwrap(), "--layers", "1", "--dtype", "float16", "-q"]);
    build_reference(&checkpoint, &output, &["--quant", "int4-g16", "--max-output-len", "9"]);
    let found = run(&output, &["--image", &page(root.path()).0]);
    assert!((1..=9).contains(&ids(&found[0]).len()), "{found:?}");
}

fn mbart(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["MBartForConditionalGeneration"], "model_type": "mbart", "d_model": 64, "vocab_size": 448,
        "encoder_layers": 2, "encoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_layers": 2,
        "decoder_ffn_dim": 80, "decoder_attention_heads": 2, "max_position_embeddings": 128, "scale_embedding": true,
        "decoder_start_token_id": 2, "torch_dtype": "float32",
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

#[test]
fn mbart_runs_alone() {
    let root = tempfile::tempdir().unwrap();
    for (name, changes) in
        [("whole", json!({})), ("decoder", json!({ "architectures": ["MBartForCausalLM"], "scale_embedding": false }))]
    {
        let config = mbart(changes);
        let (checkpoint, output) = (root.path().join(name), root.path().join(format!("{name}-engines")));
        write_checkpoint(&checkpoint, &config, &random_tensors(&config), DType::Float16, 2);
        build_reference(&checkpoint, &output, &["--max-batch-size", "2", "--quant", "int8"]);
        let ask = |prompts: &[&str]| -> Vec<Vec<u64>> {
            run(&output, &[&["--prompt"], prompts, &["--max-new-tokens", "8"]].concat()).iter().map(ids).collect()
        };
        let (one, two) = (ask(&["A short one"]).remove(0), ask(&["Another text, which is longer"]).remove(0));
        assert_ne!(one, two, "{name}: the text matters");
        assert_eq!(ask(&["A short one", "Another text, which is longer"]), [one, two], "{name}");
        let (code, text) = refuse(&["run", output.to_str().unwrap(), "--image", &page(root.path()).0]);
        assert!(code == 1 && text.contains("no prompt is given"), "{text}");
    }
}
