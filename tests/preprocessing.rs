//! Pictures and prompts against what Pillow and HF make of them. Goldens: fixtures/generator/pillow_resize.py.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use image::{ExtendedColorType, ImageEncoder};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use trtvlm::processor::{
    ChatMessage, ChatTemplate, Filter, ImageProcessor, Picture, Processor, ProcessorError, PromptRequest,
    PromptSettings, PromptTemplate, TextProcessor, resize,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn json_file(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name)).expect("fixture");
    serde_json::from_str(&text).expect("JSON")
}

fn number(value: &Value) -> usize {
    value.as_u64().expect("number") as usize
}

fn text(value: &Value) -> &str {
    value.as_str().expect("text")
}

fn items(value: &Value) -> &[Value] {
    value.as_array().expect("list")
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hexadecimal(text: &str) -> Vec<u8> {
    let pairs = (0..text.len()).step_by(2);
    pairs.map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal")).collect()
}

/// The generator's pictures, in integers.
fn picture(kind: &str, width: usize, height: usize) -> Picture {
    let waves = |x: i64, y: i64| [x * 5 + y, y * 6 + x * x / 9, (x - 20).pow(2) + (y - 15).pow(2)];
    let page = |x: i64, y: i64| {
        let (w, h) = (width as i64, height as i64);
        let inside = x >= w / 5 && x < w - w / 7 && y >= h / 9 && y < h - h / 4;
        match inside && (x * 7 + y * 13) % 11 < 4 {
            true => [x % 90, y % 120, x * y % 160],
            false => [244 + (x + y) % 9, 240 + (x * 3 + y) % 7, 247 + y % 5],
        }
    };
    let rgb = match kind {
        "flat" => [40, 130, 90].repeat(width * height),
        "page" => (0..height as i64)
            .flat_map(|y| (0..width as i64).flat_map(move |x| page(x, y)))
            .map(|value| value as u8)
            .collect(),
        "waves" => (0..height as i64)
            .flat_map(|y| (0..width as i64).flat_map(move |x| waves(x, y)))
            .map(|value| (value % 256) as u8)
            .collect(),
        _ => (0..(width * height * 3) as u64).map(|n| ((n * 2_654_435_761 % (1 << 32)) >> 13) as u8).collect(),
    };
    Picture::from_rgb(width, height, rgb).expect("sides agree")
}

#[test]
fn resizes_equal_pillow_in_every_byte() {
    let golden = json_file("preprocessing/resize.json");
    let cases = items(&golden["cases"]);
    assert_eq!(cases.len(), 264);
    for case in cases {
        let picture = picture(text(&case[0]), number(&case[1]), number(&case[2]));
        let filter = Filter::from_number(case[5].as_u64().expect("number")).expect("filter");
        let resized = resize(&picture, number(&case[3]), number(&case[4]), filter);
        assert_eq!(sha256(&resized.rgb), text(&case[6]), "{case}");
    }
}

#[test]
fn pixel_values_equal_transformers_in_every_bit() {
    let cases = json_file("preprocessing/pixel_values.json");
    for case in items(&cases) {
        let picture = picture(text(&case["kind"]), number(&case["width"]), number(&case["height"]));
        let processor = ImageProcessor::from_configs(Some(&case["config"]), None)
            .unwrap_or_else(|error| panic!("{}: {error}", case["config"]));
        let (height, width) = processor.size().expect("fixed size");
        assert_eq!(case["shape"], json!([3, height, width]), "{}", case["config"]);
        let values = processor.process(&picture).expect("processed");
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(sha256(&bytes), text(&case["sha256"]), "{case}");
    }
}

/// Margins, turns, thumbnails with their reducing gap, and frames; what transformers cannot do is refused.
#[test]
fn pages_equal_transformers_in_every_bit() {
    let cases = json_file("preprocessing/pages.json");
    let (mut equal, mut refused) = (0, 0);
    for case in items(&cases) {
        let picture = picture(text(&case["kind"]), number(&case["width"]), number(&case["height"]));
        let processor = ImageProcessor::from_configs(Some(&case["config"]), None)
            .unwrap_or_else(|error| panic!("{}: {error}", case["config"]));
        match (processor.process(&picture), case["sha256"].as_str()) {
            (Ok(values), Some(wanted)) => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                assert_eq!(sha256(&bytes), wanted, "{case}");
                equal += 1;
            }
            (Err(ProcessorError::Picture { .. }), None) => refused += 1,
            (found, wanted) => panic!("{case}: {:?}, wanted {wanted:?}", found.map(|values| values.len())),
        }
    }
    assert_eq!((equal + refused, equal > 200, refused > 0), (297, true, true));
}

#[test]
fn picture_files_equal_pillow() {
    let cases = json_file("preprocessing/pictures.json");
    for case in items(&cases) {
        let name = text(&case["name"]);
        let picture = Picture::decode(&from_hexadecimal(text(&case["file"])), name).expect(name);
        assert_eq!((picture.width, picture.height), (number(&case["width"]), number(&case["height"])), "{name}");
        let golden = from_hexadecimal(text(&case["rgb"]));
        let worst = picture.rgb.iter().zip(&golden).map(|(a, b)| a.abs_diff(*b)).max();
        match name {
            // Pillow clips 16-bit grey to 255, which leaves it white: ours is the high byte, as Pillow's for 16-bit RGB.
            "16-bit grey" => {
                let high = (0..35u32).flat_map(|n| [((n * 1873 % 65536) >> 8) as u8; 3]);
                assert_eq!(picture.rgb, high.collect::<Vec<_>>());
            }
            // Another decoder than libjpeg.
            _ if name.starts_with("jpeg") => assert!(worst <= Some(3), "{name}: {worst:?}"),
            _ => assert_eq!(picture.rgb, golden, "{name}"),
        }
    }
}

/// A PNG of 8 x 8 grey pixels whose header claims other sides.
fn png_claiming(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    image::codecs::png::PngEncoder::new(&mut bytes)
        .write_image(&[9; 64], 8, 8, ExtendedColorType::L8)
        .expect("encodes");
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let mut checksum = u32::MAX;
    for byte in &bytes[12..29] {
        checksum ^= u32::from(*byte);
        for _ in 0..8 {
            checksum = checksum >> 1 ^ if checksum & 1 == 1 { 0xEDB8_8320 } else { 0 };
        }
    }
    bytes[29..33].copy_from_slice(&(!checksum).to_be_bytes());
    bytes
}

#[test]
fn odd_pictures_are_refused_with_the_reason() {
    let whole = png_claiming(8, 8);
    assert!(Picture::decode(&whole, "p").is_ok());
    let cut = |at: usize| whole[..at].to_vec();
    let pixels = |sides: &str, reason: &str| format!("picture `p`: found {sides} pixels: {reason}");
    let cases = [
        (b"hello".to_vec(), "picture `p`: this is not a PNG or JPEG file".to_owned()),
        (Vec::new(), "picture `p`: this is not a PNG or JPEG file".to_owned()),
        (b"GIF89a-----".to_vec(), "picture `p`: found Gif, wanted PNG or JPEG".to_owned()),
        (cut(20), "picture `p`: the file is damaged or cut short".to_owned()),
        (cut(45), "picture `p`: the file is damaged or cut short".to_owned()),
        (png_claiming(8, 4000), pixels("`8` x `4000`", "its longer side may be `200` times the shorter one at most")),
        (png_claiming(1601, 8), pixels("`1601` x `8`", "its longer side may be `200` times the shorter one at most")),
        (png_claiming(8193, 8000), pixels("`8193` x `8000`", "its longer side may be `8192` pixels at most")),
        (
            png_claiming(0x7fff_ffff, 0x7fff_ffff),
            pixels("`2147483647` x `2147483647`", "its longer side may be `8192` pixels at most"),
        ),
        (png_claiming(1600, 8), "picture `p`: the file is damaged or cut short".to_owned()),
        (b"\xff\xd8\xff\xe0 not much of a JPEG".to_vec(), "picture `p`: the file is damaged or cut short".to_owned()),
    ];
    for (bytes, message) in cases {
        let error = Picture::decode(&bytes, "p").expect_err(&message);
        assert_eq!(error.to_string(), message);
        assert!(error.hint().is_some());
    }
    assert!(Picture::from_rgb(2, 2, vec![0; 11]).is_err());
    assert!(Picture::from_rgb(0, 0, Vec::new()).is_err());
    let error = Picture::open(Path::new("/no/such/file.png")).expect_err("missing");
    assert_eq!(error.to_string(), "cannot read `/no/such/file.png`");
}

#[test]
fn settings_that_cannot_be_followed_are_refused() {
    let clip = |more: Value| {
        let mut config = json!({"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 28});
        let more = more.as_object().expect("object").clone();
        config.as_object_mut().expect("object").extend(more);
        config
    };
    let nougat = |more: Value| {
        let mut config = json!({"image_processor_type": "NougatImageProcessor"});
        config.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        config
    };
    let cases = [
        (json!({"image_processor_type": "DonutImageProcessor"}), "image_processor_type"),
        (nougat(json!({"size": {"shortest_edge": 40}})), "size"),
        (nougat(json!({"do_pad": false})), "size"),
        (nougat(json!({"do_crop_margin": "yes"})), "do_crop_margin"),
        (nougat(json!({"do_align_long_axis": 1})), "do_align_long_axis"),
        (nougat(json!({"do_thumbnail": 0})), "do_thumbnail"),
        (nougat(json!({"resample": -1})), "resample"),
        (json!({"size": 28}), "image_processor_type"),
        (clip(json!({"size": {"longest_edge": 28}})), "size"),
        (clip(json!({"size": 0})), "size"),
        (clip(json!({"size": 1u64 << 40})), "size"),
        (clip(json!({"do_center_crop": false})), "size"),
        (clip(json!({"crop_size": "28"})), "crop_size"),
        (clip(json!({"crop_size": {"height": -1, "width": 4}})), "crop_size"),
        (clip(json!({"resample": 6})), "resample"),
        (clip(json!({"image_std": [0.5, 0.0, 0.5]})), "image_std"),
        (clip(json!({"image_mean": [0.5, 0.5]})), "image_mean"),
        (clip(json!({"rescale_factor": "1/255"})), "rescale_factor"),
        (clip(json!({"do_pad": true})), "do_pad"),
        (clip(json!({"do_resize": 1})), "do_resize"),
    ];
    for (config, wanted) in cases {
        match ImageProcessor::from_configs(Some(&config), None) {
            Err(ProcessorError::Setting { setting, .. }) => assert_eq!(setting, wanted, "{config}"),
            other => panic!("{config}: {other:?}"),
        }
    }
    assert!(ImageProcessor::from_configs(None, None).is_err());
}

#[test]
fn original_llava_pads_to_a_square_of_the_mean() {
    let config = json_file("llava-hf/preprocessor_config.json");
    let plain = ImageProcessor::from_configs(Some(&config), None).expect("settings");
    let kept = serde_json::to_string(&plain).expect("serializes");
    assert_eq!(serde_json::from_str::<ImageProcessor>(&kept).expect("deserializes"), plain);
    let padded = plain.with_square_padding();
    assert_eq!(padded.size(), Some((28, 28)));
    let picture = Picture::from_rgb(40, 21, vec![255; 40 * 21 * 3]).expect("picture");
    let seen = padded.prepare(&picture).expect("prepared");
    // int(mean * 255) of CLIP, above and below the white band.
    assert_eq!(seen.rgb[..3], [122, 116, 104]);
    assert_eq!(seen.rgb[seen.rgb.len() - 3..], [122, 116, 104]);
    assert_eq!(seen.rgb[(14 * 28 + 14) * 3..][..3], [255; 3]);
}

fn golden_values(golden: &SafeTensors<'_>, name: &str) -> Vec<u8> {
    golden.tensor(name).expect("tensor").data().to_vec()
}

/// The picture, the pixel values, and the ids of the golden's prompt and of others that must be the same, for any place in
/// a batch.
#[test]
fn goldens_are_reproduced() {
    for (name, settings, other, end) in [
        ("llava-hf", LLAVA, Some("What is shown?"), 2),
        ("llava-v4names", LLAVA, Some("What is shown?"), 2),
        ("llava-v5names", LLAVA, Some("What is shown?"), 2),
        ("blip2-opt", BLIP2, None, 202),
        ("blip2-opt", PromptSettings { image_token_id: None, ..BLIP2 }, None, 202),
    ] {
        let folder = fixture(name);
        let bytes = std::fs::read(folder.join("golden.safetensors")).expect("golden");
        let golden = SafeTensors::deserialize(&bytes).expect("safetensors");
        let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("header");
        let processor = Processor::open(&folder).expect("folder");

        let picture = Picture::from_rgb(53, 41, golden_values(&golden, "image_u8")).expect("picture");
        let values = processor.image.expect("image settings").process(&picture).expect("pixel values");
        let wanted = golden_values(&golden, "pixel_values");
        let wanted = wanted.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        assert_eq!(values.len(), wanted.len());
        let worst = values.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-6, "{worst}");

        let prompt = &metadata.metadata().as_ref().expect("metadata")["prompt"];
        let ids = golden_values(&golden, "input_ids");
        let wanted: Vec<i64> = ids.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
        let image = processor.text.token_id("<image>").expect("image token");
        for (prompt, first_picture) in [(prompt.as_str(), 0), (other.unwrap_or(prompt), 3)] {
            let request = PromptRequest { prompt, pictures: 1, first_picture, add_special_tokens: true };
            let input = settings.build(&processor.text, request).expect("input");
            let (vocabulary, features) = (settings.vocabulary as i32, settings.features_per_picture as i32);
            let rows: Vec<i32> = input.ids.iter().copied().filter(|id| *id >= vocabulary).collect();
            let first = vocabulary + features * first_picture as i32;
            assert_eq!(rows, (first..first + features).collect::<Vec<_>>());
            let mapped = input.ids.iter().map(|id| if *id >= vocabulary { i64::from(image) } else { i64::from(*id) });
            assert_eq!(mapped.collect::<Vec<_>>(), wanted);
        }
        assert_eq!(processor.text.eos_ids(), [end], "{name}");
    }
}

const LLAVA: PromptSettings = PromptSettings {
    template: PromptTemplate::Llava,
    image_token_id: Some(400),
    features_per_picture: 16,
    vocabulary: 448,
    maximum_length: Some(64),
};

const BLIP2: PromptSettings = PromptSettings {
    template: PromptTemplate::Blip2,
    image_token_id: Some(320),
    features_per_picture: 4,
    vocabulary: 336,
    maximum_length: Some(64),
};

fn llava_text() -> TextProcessor {
    TextProcessor::open(&fixture("llava-hf")).expect("tokenizer")
}

fn ask(prompt: &str, pictures: usize) -> PromptRequest<'_> {
    PromptRequest { prompt, pictures, first_picture: 0, add_special_tokens: true }
}

#[test]
fn prompts_that_do_not_fit_are_refused() {
    let text = llava_text();
    let message = |settings: PromptSettings, request| match settings.build(&text, request) {
        Err(error) => error.to_string(),
        Ok(input) => panic!("accepted: {input:?}"),
    };
    let pairs = "image placeholders in the prompt, wanted one for each of";
    assert_eq!(message(LLAVA, ask("<image> and <image>", 1)), format!("found `2` {pairs} `1` pictures"));
    assert_eq!(message(LLAVA, ask("<image>", 2)), format!("found `1` {pairs} `2` pictures"));
    assert_eq!(message(LLAVA, ask("<image>", 0)), format!("found `1` {pairs} `0` pictures"));
    assert_eq!(message(LLAVA, ask(" \n", 0)), "the prompt is empty");
    let long = message(LLAVA, ask("a photo of a cat and another cat", 3));
    assert!(long.ends_with("(of these `48` for pictures), the engine takes `64`"), "{long}");
    let small = PromptSettings { vocabulary: 300, ..LLAVA };
    let outside = message(small, ask("USER: a photo of a cat", 0));
    assert!(outside.ends_with("is outside the vocabulary of `300`"), "{outside}");
    let blind =
        PromptSettings { template: PromptTemplate::Plain, image_token_id: None, features_per_picture: 0, ..LLAVA };
    assert_eq!(message(blind, ask("a", 1)), "found `1` pictures, wanted none: this model reads text only");
    let far = PromptRequest { first_picture: usize::MAX, ..ask("a", 1) };
    assert!(message(LLAVA, far).starts_with("picture rows up to"));
}

#[test]
fn features_go_where_the_placeholders_are() {
    let text = llava_text();
    let settings = PromptSettings { features_per_picture: 2, ..LLAVA };
    let request = PromptRequest { first_picture: 5, ..ask("<image>a<image>", 2) };
    let input = settings.build(&text, request).expect("input");
    let letter = i32::try_from(*text.encode("a", false).expect("ids").last().expect("id")).expect("small");
    assert_eq!(input.ids.first(), Some(&1));
    assert_eq!(input.ids[1..3], [458, 459]);
    assert_eq!(input.ids[input.ids.len() - 3..], [letter, 460, 461]);
    assert_eq!(input.picture_tokens, 4);
    let before = PromptSettings { image_token_id: None, template: PromptTemplate::Plain, ..settings };
    let input = before.build(&text, ask("", 1)).expect("a caption");
    assert_eq!(input.ids, [448, 449, 1]);
}

/// As transformers has it: all query tokens, then BOS, then the prompt; nothing but BOS for a caption.
#[test]
fn query_tokens_go_before_everything() {
    let text = TextProcessor::open(&fixture("blip2-opt")).expect("tokenizer");
    let caption = BLIP2.build(&text, ask("", 1)).expect("a caption");
    assert_eq!(caption.ids, [336, 337, 338, 339, 2]);
    let two = BLIP2.build(&text, ask("", 2)).expect("two pictures");
    assert_eq!((two.ids.len(), two.picture_tokens), (9, 8));
    let words = BLIP2.build(&text, ask("a cat", 0)).expect("words alone");
    assert_eq!((words.ids[0], words.picture_tokens), (2, 0));
    let error = BLIP2.build(&text, ask("<image> a cat", 1)).expect_err("a placeholder");
    assert_eq!(
        error.to_string(),
        "found `1` image placeholders in the prompt, wanted none: pictures come before the whole prompt"
    );
    assert!(BLIP2.build(&text, ask("", 0)).is_err());
}

#[test]
fn chat_templates_are_found_in_each_place() {
    let folder = tempfile::tempdir().expect("folder");
    let open = || ChatTemplate::open(folder.path(), true).expect("opens");
    let rendered = || {
        let message = ChatMessage { role: "user", text: "hi", pictures: 0 };
        open().expect("template").render(&[message]).expect("renders").0
    };
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("written");
    assert!(open().is_none());
    write("tokenizer_config.json", r#"{"chat_template": "one {{ messages[0].content }}"}"#);
    assert_eq!(rendered(), "one hi");
    let named = r#"{"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "two"}]}"#;
    write("tokenizer_config.json", named);
    assert_eq!(rendered(), "two");
    write("chat_template.json", r#"{"chat_template": "three"}"#);
    assert_eq!(rendered(), "three");
    write("chat_template.jinja", "{% if add_generation_prompt %}\nfour\n{% endif %}");
    assert_eq!(rendered(), "four\n");
}

#[test]
#[ignore = "needs the trained models outside of the repository, their folder in TRTVLM_TRAINED"]
fn trained_checkpoints_open() {
    let folder = PathBuf::from(std::env::var_os("TRTVLM_TRAINED").expect("TRTVLM_TRAINED"));
    let sides = [("trained-llava", ""), ("trained-blip2-opt", ""), ("trained-blip2-t5", ""), ("trained-vila", "llm")];
    for (name, inner) in sides {
        let processor = Processor::open(&folder.join(name).join(inner)).expect(name);
        if let Some(image) = processor.image {
            assert_eq!(image.size(), Some((80, 80)), "{name}");
        }
        let task = std::fs::read_to_string(folder.join(name).join("task.json")).expect("task");
        let task: Value = serde_json::from_str(&task).expect("JSON");
        assert_eq!(processor.text.eos_ids(), [number(&task["eos"]) as u32], "{name}");
        let (settings, features) = match name {
            "trained-llava" => (LLAVA, 100),
            "trained-blip2-opt" => (BLIP2, 32),
            _ => continue,
        };
        let settings = PromptSettings {
            image_token_id: processor.text.token_id("<image>"),
            features_per_picture: features,
            vocabulary: 1 << 20,
            maximum_length: None,
            ..settings
        };
        let input = settings.build(&processor.text, ask(text(&task["prompt"]), 1)).expect("input");
        let ids = |name: &str| items(&task[name]).iter().map(|id| number(id) as i32).collect::<Vec<_>>();
        let before = ids("before");
        assert_eq!(input.ids[..before.len()], before);
        assert_eq!(input.ids[before.len() + features..], ids("after"));
    }
}

proptest! {
    #[test]
    fn damaged_files_never_panic(at in 0usize..2000, byte: u8, which in 0usize..20) {
        let cases = json_file("preprocessing/pictures.json");
        let mut bytes = from_hexadecimal(text(&cases[which]["file"]));
        let length = bytes.len();
        bytes[at % length] = byte;
        let _ = Picture::decode(&bytes, "p");
        bytes.truncate(at % length);
        let _ = Picture::decode(&bytes, "p");
    }
}
