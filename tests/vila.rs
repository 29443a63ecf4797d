//! VILA: checkpoints of three folders and flat ones, their prompts and pictures, answers on the reference.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::{Aspect, DType};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::os::unix::fs::symlink;
use std::path::Path;
use trtvlm::checkpoint::Checkpoint;
use trtvlm::processor::{Picture, Processor, PromptRequest, PromptSettings, PromptTemplate, TextProcessor};

const NAMES: [&str; 2] = ["vila-v15-siglip", "vila-v10-clip"];
/// The prompt that the goldens' ids were made of.
const PROMPT: &str = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
                      detailed, and polite answers to the user's questions. USER: <image>\nWhat is shown? ASSISTANT:";

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(fixture(name).join("golden.safetensors")).unwrap()
}

fn numbers(golden: &[u8], name: &str) -> Vec<i64> {
    let file = SafeTensors::deserialize(golden).unwrap();
    let data = file.tensor(name).unwrap().data();
    data.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
}

#[test]
fn three_folders_open_as_one() {
    let folder = fixture("vila-v15-siglip");
    let checkpoint = Checkpoint::open_folder(&folder).unwrap();
    assert_eq!((checkpoint.tensors().len(), checkpoint.weights().files().len()), (91, 3));
    assert_eq!(checkpoint.folders().len(), 4);
    assert_eq!(checkpoint.warnings(), Vec::<String>::new());
    for part in ["llm", "vision_tower", "mm_projector"] {
        let path = folder.join(part).join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let name = format!("{part}.{name}");
            let entry = checkpoint.tensor(&name).unwrap();
            assert_eq!(checkpoint.weights().path_of(entry), Some(&*path));
            let mut read = vec![0; entry.bytes as usize];
            checkpoint.read_into(&name, 0, &mut read).unwrap();
            assert_eq!((&read[..], &entry.shape[..]), (view.data(), view.shape()), "{name}");
        }
    }
    checkpoint.unchanged().unwrap();
}

#[test]
fn folders_are_told_by_the_config_and_stay_inside() {
    let open = |damage: &dyn Fn(&Path)| {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("any name at all");
        copy_folder(&fixture("vila-v15-siglip"), &folder);
        damage(&folder);
        match Checkpoint::open_folder(&folder) {
            Ok(checkpoint) => checkpoint.config()["llm_cfg"]["vocab_size"].to_string(),
            Err(error) => error.to_string().replace(root.path().to_str().unwrap(), ""),
        }
    };
    assert_eq!(open(&|_| ()), "400");
    // The part's own config counts, whatever the root says about it.
    let path = "/home/author/checkpoints/vila/llm";
    assert_eq!(open(&|folder| edit_json(&folder.join("config.json"), |root| root["llm_cfg"] = json!(path))), "400");
    let moved = |folder: &Path| {
        std::fs::rename(folder.join("llm"), folder.join("elsewhere")).unwrap();
        symlink("elsewhere", folder.join("llm")).unwrap();
    };
    assert_eq!(open(&moved), "400");
    for (damage, wanted) in [
        (
            &(|folder: &Path| std::fs::remove_dir_all(folder.join("mm_projector")).unwrap()) as &dyn Fn(&Path),
            "the folder `/any name at all/mm_projector` is missing, which config.json describes under `mm_projector_cfg`",
        ),
        (
            &|folder| {
                std::fs::rename(folder.join("llm"), folder.join("../llm")).unwrap();
                symlink("../llm", folder.join("llm")).unwrap();
            },
            "`/any name at all/llm` leads to `/llm`, outside of `/any name at all`",
        ),
        (
            &|folder| {
                std::fs::remove_dir_all(folder.join("llm")).unwrap();
                std::fs::write(folder.join("llm"), "").unwrap();
            },
            "`/any name at all/llm` is not a folder",
        ),
        (
            &|folder| std::fs::write(folder.join("llm/config.json"), "[]").unwrap(),
            "`/any name at all/llm/config.json` holds an array, wanted an object",
        ),
        (
            &|folder| std::fs::remove_file(folder.join("vision_tower/config.json")).unwrap(),
            "`/any name at all/vision_tower/config.json` is missing",
        ),
        (
            &|folder| std::fs::remove_file(folder.join("llm/model.safetensors")).unwrap(),
            "`/any name at all/llm` holds no weights: found neither `model.safetensors` nor `pytorch_model.bin` nor an \
             index of either",
        ),
    ] {
        assert_eq!(open(damage), wanted);
    }
}

#[test]
fn a_part_that_changes_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    copy_folder(&fixture("vila-v15-siglip"), root.path());
    for name in ["vision_tower/config.json", "mm_projector/model.safetensors"] {
        let checkpoint = Checkpoint::open_folder(root.path()).unwrap();
        let path = root.path().join(name);
        let content = std::fs::read(&path).unwrap();
        std::fs::write(&path, &content[1..]).unwrap();
        let error = checkpoint.unchanged().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("was changed since it was opened"), "{error}");
        std::fs::write(&path, content).unwrap();
    }
}

#[test]
fn pixels_and_ids_equal_the_goldens() {
    for (name, aspect, features) in [(NAMES[0], Aspect::Resize, 9), (NAMES[1], Aspect::Pad, 16)] {
        let checkpoint = Checkpoint::open_folder(&fixture(name)).unwrap();
        let processor = Processor::open_parts(&checkpoint.folders()).unwrap();
        let bytes = golden(name);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let picture = Picture::from_rgb(53, 41, file.tensor("image_u8").unwrap().data().to_vec()).unwrap();
        let values = processor.image.unwrap().with_aspect(aspect).process(&picture).unwrap();
        let wanted = file.tensor("pixel_values").unwrap().data();
        let wanted: Vec<f32> = wanted.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert_eq!(values, wanted, "{name}");

        let settings = PromptSettings {
            template: PromptTemplate::Vila,
            image_token_id: None,
            features_per_picture: features,
            vocabulary: 400,
            maximum_length: None,
        };
        let wanted =
            [numbers(&bytes, "ids_before"), (400..400 + features as i64).collect(), numbers(&bytes, "ids_after")];
        // The whole prompt, or the question alone in the family's words.
        for prompt in [PROMPT, "What is shown?"] {
            let request = PromptRequest { prompt, pictures: 1, first_picture: 0, add_special_tokens: true };
            let input = settings.build(&processor.text, request).unwrap();
            let found: Vec<i64> = input.ids.iter().map(|&id| i64::from(id)).collect();
            assert_eq!(found, wanted.concat(), "{name}");
        }
        assert_eq!(processor.text.eos_ids(), [2]);
    }
}

#[test]
fn prompts_are_split_at_the_placeholder() {
    let text = TextProcessor::open(&fixture("vila-v10-clip")).unwrap();
    let settings = PromptSettings {
        template: PromptTemplate::Vila,
        image_token_id: None,
        features_per_picture: 2,
        vocabulary: 400,
        maximum_length: None,
    };
    let request = |prompt, pictures| PromptRequest { prompt, pictures, first_picture: 3, add_special_tokens: true };
    let build = |prompt, pictures| settings.build(&text, request(prompt, pictures)).map(|input| input.ids);
    let ids =
        |part: &str, first| -> Vec<i32> { text.encode(part, first).unwrap().into_iter().map(|id| id as i32).collect() };
    let wanted = [ids("a ", true), vec![406, 407], ids(" and ", false), vec![408, 409]].concat();
    assert_eq!(build("a <image> and <image>", 2).unwrap(), wanted);
    // Each part is tokenized as a text of its own, not as the middle of a longer one.
    assert_ne!(ids("b", false), ids("ab", false)[ids("a", false).len()..].to_vec());
    assert_eq!(build("a<image>b", 1).unwrap(), [ids("a", true), vec![406, 407], ids("b", false)].concat());
    assert_eq!(build("<image>", 1).unwrap(), [1, 406, 407]);
    assert_eq!(build("a", 0).unwrap(), ids("a", true));
    let message = |prompt, pictures| build(prompt, pictures).unwrap_err().to_string();
    let pairs = "image placeholders in the prompt, wanted one for each of";
    assert_eq!(message("<image><image>", 1), format!("found `2` {pairs} `1` pictures"));
    assert_eq!(message("<image>", 0), format!("found `1` {pairs} `0` pictures"));
}

/// The fixture with room for the golden's prompt, which is longer than its config admits.
fn roomy(name: &str, root: &Path) -> std::path::PathBuf {
    let folder = root.join(name);
    copy_folder(&fixture(name), &folder);
    let config = if name == NAMES[0] { "llm/config.json" } else { "config.json" };
    edit_json(&folder.join(config), |config| config["max_position_embeddings"] = json!(256));
    folder
}

fn picture(name: &str, root: &Path) -> String {
    let bytes = golden(name);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let path = root.join("golden.png");
    let pixels = file.tensor("image_u8").unwrap().data().to_vec();
    image::RgbImage::from_raw(53, 41, pixels).unwrap().save(&path).unwrap();
    path.display().to_string()
}

#[test]
fn vila_generates_what_transformers_generates() {
    let root = tempfile::tempdir().unwrap();
    for name in NAMES {
        let wanted: Vec<u64> = numbers(&golden(name), "generated").iter().map(|&id| id as u64).collect();
        let (picture, output) = (picture(name, root.path()), root.path().join(format!("{name}-engines")));
        build_reference(&roomy(name, root.path()), &output, &["--max-batch-size", "2"]);
        let count = wanted.len().to_string();
        for prompt in [PROMPT, "What is shown?"] {
            let found = run(&output, &["--image", &picture, "--prompt", prompt, "--max-new-tokens", &count]);
            assert_eq!(ids(&found[0]), wanted, "{name}");
        }
        // Another prompt with another picture beside it changes nothing.
        let black = root.path().join("black.png");
        image::RgbImage::new(40, 30).save(&black).unwrap();
        let black = black.display().to_string();
        let pair = ["--image", &black, &picture, "--prompt", "<image>Why?", PROMPT, "--max-new-tokens", &count];
        let found = run(&output, &pair);
        assert_eq!(ids(&found[1]), wanted, "{name} in a batch");
        let alone = run(&output, &["--image", &black, "--prompt", "<image>Why?", "--max-new-tokens", &count]);
        assert_eq!(ids(&found[0]), ids(&alone[0]), "{name}, the other");
        let config: Value =
            serde_json::from_slice(&std::fs::read(output.join("language/config.json")).unwrap()).unwrap();
        assert_eq!(config["pretrained_config"]["multimodal"]["prompt_template"], json!("vila"));
    }
}

/// A flat checkpoint in original LLaVA's names with the `linear` projector.
#[test]
fn a_flat_checkpoint_with_one_linear_layer_answers() {
    let root = tempfile::tempdir().unwrap();
    let mut config = llama_config(json!({
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_projector_type": "linear",
        "mm_vision_select_layer": -1, "image_aspect_ratio": "square", "max_position_embeddings": 256,
    }));
    config["vision_config"] = llava_config(json!({}))["vision_config"].clone();
    let flat = |name: &str| match name.split_once('.').unwrap() {
        ("llm", rest) => rest.to_owned(),
        ("mm_projector", rest) => format!("model.mm_projector{}", rest.strip_prefix("layers").unwrap()),
        _ => format!("model.vision_tower.{name}"),
    };
    let tensors: Tensors = random_tensors(&config).into_iter().map(|(name, tensor)| (flat(&name), tensor)).collect();
    assert_eq!(tensors["model.mm_projector.weight"].0, [64, 40]);
    let (checkpoint, output) = (root.path().join("checkpoint"), root.path().join("engines"));
    write_checkpoint(&checkpoint, &config, &tensors, DType::Float16, 2);
    build_reference(&checkpoint, &output, &["--quant", "int8", "--vision-quant", "int8"]);
    let picture = picture(NAMES[1], root.path());
    let ask = |prompt: &str| ids(&run(&output, &["--image", &picture, "--prompt", prompt, "--max-new-tokens", "6"])[0]);
    assert_eq!(ask("What is shown?"), ask(PROMPT));
    assert_ne!(ask("<image>a"), ask("a<image>"));
    // Weights of another model are refused with both names.
    edit_json(&checkpoint.join("config.json"), |config| config["mm_projector_type"] = json!("mlp2x_gelu"));
    let output = output.display().to_string();
    let (code, text) = refuse(&["build", checkpoint.to_str().unwrap(), "-o", &output, "--target", "reference"]);
    assert!(code == 1 && text.contains("tensor `mm_projector.layers.0.weight` is missing"), "{text}");
}
