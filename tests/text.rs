//! Texts to ids and back: tokenizer.json files, `tokenizer.model` files against SentencePiece's own ids, streams.
#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::fixture;
use proptest::prelude::*;
use serde_json::{Value, json};
use trtvlm::processor::{ProcessorError, TextProcessor};

const BOS: u32 = 1;
const EOS: u32 = 2;

/// A folder with this `tokenizer.model` and this tokenizer_config.json.
fn folder(model: &[u8], config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("folder");
    std::fs::write(folder.path().join("tokenizer.model"), model).expect("written");
    std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("written");
    folder
}

fn json_file(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(fixture(name)).expect("read");
    serde_json::from_str(&text).expect("JSON")
}

fn llava_text() -> TextProcessor {
    TextProcessor::open(&fixture("llava-hf")).expect("tokenizer")
}

fn model() -> Vec<u8> {
    std::fs::read(fixture("sentencepiece").join("tokenizer.model")).expect("read")
}

fn golden() -> Vec<(String, Vec<u32>)> {
    let ids = |row: &Value| serde_json::from_value(row["ids"].clone()).expect("ids");
    json_file("sentencepiece/golden.json")
        .iter()
        .map(|row| (row["text"].as_str().expect("text").to_owned(), ids(row)))
        .collect()
}

fn reason(folder: &Path) -> String {
    match TextProcessor::open(folder) {
        Err(ProcessorError::Parse { path, reason }) if path.ends_with("tokenizer.model") => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ids_and_texts_are_those_of_sentencepiece() {
    let golden = golden();
    assert!(golden.len() > 10);
    for config in [r#"{"legacy": false, "eos_token": "</s>"}"#, r#"{"eos_token": "</s>"}"#] {
        let folder = folder(&model(), config);
        let text = TextProcessor::open(folder.path()).expect("tokenizer");
        assert_eq!(text.eos_ids(), [EOS]);
        // As with transformers, and unlike with SentencePiece: old tokenizers add a blank after each token of the
        // user's, new ones add none to a text that begins with one.
        let same =
            |line: &str| if config.contains("legacy") { !line.starts_with(' ') } else { !line.contains("<note>") };
        for (line, ids) in golden.iter().filter(|(line, _)| same(line)) {
            assert_eq!(text.encode(line, false).expect("ids"), *ids, "{line:?} with {config}");
            assert_eq!(text.encode(line, true).expect("ids"), [&[BOS], ids.as_slice()].concat(), "{line:?}");
            assert_eq!(text.decode(ids).expect("text"), *line, "{config}");
        }
    }
}

/// T5's kind: a unigram model whose text is normalized, with an end and a hundred tokens of no text.
#[test]
fn ids_are_those_of_sentencepiece_unigram() {
    let golden = json_file("spiece/golden.json");
    assert!(golden.len() > 15);
    let model = std::fs::read(fixture("spiece").join("spiece.model")).expect("read");
    let (named, classed) =
        (tempfile::tempdir().expect("folder"), folder(&model, r#"{"tokenizer_class": "T5Tokenizer"}"#));
    std::fs::write(named.path().join("spiece.model"), &model).expect("written");
    let modern = folder(&model, r#"{"tokenizer_class": "T5TokenizerFast", "legacy": false, "extra_ids": 100}"#);
    for folder in [named.path(), classed.path(), modern.path()] {
        let text = TextProcessor::open(folder).expect("tokenizer");
        for row in &golden {
            let line = row["text"].as_str().expect("text");
            let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).expect("ids");
            assert_eq!(text.encode(line, false).expect("ids"), ids, "{line:?}");
            assert_eq!(text.encode(line, true).expect("ids"), [ids.as_slice(), &[1]].concat(), "{line:?}");
            // What is unknown has no text here.
            if !ids.contains(&2) {
                assert_eq!(text.decode(&ids).expect("text"), row["decoded"].as_str().expect("text"));
            }
        }
        assert_eq!((text.token_id("<extra_id_99>"), text.token_id("<extra_id_0>")), (Some(400), Some(499)));
        assert_eq!(text.encode("x<extra_id_1>", false).expect("ids"), [4, 180, 498]);
    }
    let few = folder(&model, r#"{"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "add_eos_token": false}"#);
    let text = TextProcessor::open(few.path()).expect("tokenizer");
    assert_eq!((text.encode("x", true).expect("ids"), text.token_id("<extra_id_0>")), (vec![4, 180], None));
    let many = folder(&model, r#"{"tokenizer_class": "T5Tokenizer", "extra_ids": 1000000}"#);
    assert_eq!(
        reason(many.path()),
        "found `1000000` as extra_ids of tokenizer_config.json, wanted a number up to 65536"
    );
    let llama = folder(&model, r#"{"tokenizer_class": "LlamaTokenizer"}"#);
    assert_eq!(reason(llama.path()), "found no piece `<s>`, which is the bos_token");
}

#[test]
fn the_config_says_what_stands_around_a_text() {
    let ids = |config: &str| {
        let folder = folder(&model(), config);
        TextProcessor::open(folder.path()).expect("tokenizer").encode("x", true).expect("ids")
    };
    let x = ids(r#"{"add_bos_token": false}"#);
    assert_eq!(ids("{}"), [&[BOS], x.as_slice()].concat());
    assert_eq!(ids(r#"{"add_eos_token": true}"#), [&[BOS], x.as_slice(), &[EOS]].concat());
    let folder = folder(&model(), r#"{"bos_token": "<begin>"}"#);
    assert_eq!(reason(folder.path()), "found no piece `<begin>`, which is the bos_token");
}

#[test]
fn a_tokenizer_json_beside_it_goes_first() {
    let folder = folder(b"none", "{}");
    std::fs::copy(fixture("llava-hf").join("tokenizer.json"), folder.path().join("tokenizer.json")).expect("copied");
    TextProcessor::open(folder.path()).expect("tokenizer");
}

#[test]
fn other_files_are_refused() {
    let hint = "hint: save the checkpoint's tokenizer.json with transformers";
    let wanted = "wanted a unigram model, or byte pairs of text that is left as it is";
    // A piece `a`, then a trainer (field 2) and a normalizer (field 3).
    let file = |rest: &[u8]| [&[0x0a, 3, 0x0a, 1, b'a'], rest].concat();
    let incomplete = format!("found a unigram model without an unknown piece, or with unused ones; {hint}");
    let cases: [(Vec<u8>, String); 14] = [
        (file(&[0x12, 2, 0x18, 3]), format!("found a SentencePiece model of type `3`, {wanted}; {hint}")),
        // The piece `b` is unknown, and an unused one beside it.
        (file(&[0x0a, 5, 0x0a, 1, b'b', 0x18, 2, 0x0a, 5, 0x0a, 1, b'c', 0x18, 5]), incomplete.clone()),
        (
            file(&[0x0a, 5, 0x0a, 1, b'b', 0x18, 2, 0x1a, 4, 0x12, 2, 1, 2]),
            "found a table of replacements that leads out of itself".into(),
        ),
        (vec![], "found no pieces, wanted a SentencePiece model".into()),
        (b"{\"version\"".to_vec(), "found a field of wire type `3`, wanted a SentencePiece model".into()),
        (model()[..100].to_vec(), "the file ends in the middle of a field".into()),
        (
            vec![0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            "found a number of more than ten bytes, wanted a SentencePiece model".into(),
        ),
        (file(&[]), incomplete),
        (
            file(&[0x12, 2, 0x18, 2]),
            format!("found a SentencePiece model that treats its text otherwise, {wanted}; {hint}"),
        ),
        (
            file(&[0x12, 5, 0x18, 2, 0xc0, 1, 1, 0x1a, 2, 0x20, 0]),
            format!("found a SentencePiece model that treats its text otherwise, {wanted}; {hint}"),
        ),
        (
            file(&[0x12, 2, 0x18, 2, 0x1a, 4, 0x20, 0, 0x28, 0]),
            format!("found a SentencePiece model that treats its text otherwise, {wanted}; {hint}"),
        ),
        (
            file(&[0x12, 2, 0x18, 2, 0x1a, 2, 0x20, 0, 0x0a, 3, 0x0a, 1, b'a']),
            "found a piece twice, wanted different ones".into(),
        ),
        (vec![0x0a, 3, 0x0a, 1, 0xff], "found a piece that is not UTF-8".into()),
        (vec![0x0a, 2, 0x18, 9], "found a piece of type `9`, wanted 1 to 6".into()),
    ];
    for (bytes, message) in cases {
        assert_eq!(reason(folder(&bytes, "{}").path()), message);
    }
}

#[test]
fn texts_equal_the_python_tokenizer() {
    let processor = llava_text();
    let ids = |value: &Value| serde_json::from_value::<Vec<u32>>(value.clone()).expect("ids");
    for case in json_file("preprocessing/texts.json") {
        let prompt = case["text"].as_str().expect("text");
        assert_eq!(processor.encode(prompt, true).expect("ids"), ids(&case["ids"]), "{prompt}");
        assert_eq!(processor.encode(prompt, false).expect("ids"), ids(&case["bare"]), "{prompt}");
        assert_eq!(
            processor.decode(&ids(&case["ids"])).expect("text"),
            case["decoded"].as_str().expect("text"),
            "{prompt}"
        );
    }
}

fn streamed(processor: &TextProcessor, ids: &[u32]) -> String {
    let mut stream = processor.stream();
    let mut joined = String::new();
    for id in ids {
        joined += &stream.push(*id).expect("decodes");
    }
    joined + &stream.finish().expect("decodes")
}

/// A folder with a byte-level tokenizer, as OPT and Llama 3 have.
fn byte_level() -> (tempfile::TempDir, TextProcessor) {
    let folder = tempfile::tempdir().expect("folder");
    let vocabulary: serde_json::Map<String, Value> = (0..=255u32)
        .map(|byte| {
            let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
            // Bytes that print stand for themselves; the others are moved up to 256 in order.
            let moved = (0..byte).filter(|byte| !matches!(byte, 33..=126 | 161..=172 | 174..=255)).count() as u32;
            let code = if printable { byte } else { 256 + moved };
            (char::from_u32(code).expect("code").to_string(), json!(byte))
        })
        .collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("written");
    let added = json!({"added_tokens_decoder": {
        "256": {"content": "<end>", "special": true}, "257": {"content": "<tag>", "special": false},
    }, "eos_token": {"content": "<end>"}});
    std::fs::write(folder.path().join("tokenizer_config.json"), added.to_string()).expect("written");
    let processor = TextProcessor::open(folder.path()).expect("tokenizer");
    (folder, processor)
}

#[test]
fn tokens_listed_outside_the_tokenizer_are_added() {
    let (folder, processor) = byte_level();
    assert_eq!(processor.encode("a<tag>b<end>", true).expect("ids"), [97, 257, 98, 256]);
    assert_eq!(processor.decode(&[97, 257, 98, 256]).expect("text"), "a<tag>b");
    assert_eq!(processor.eos_ids(), [256]);
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [3, 4]}"#).expect("written");
    assert_eq!(TextProcessor::open(folder.path()).expect("tokenizer").eos_ids(), [3, 4]);
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": "x"}"#).expect("written");
    assert!(matches!(TextProcessor::open(folder.path()), Err(ProcessorError::Setting { .. })));
    std::fs::write(folder.path().join("tokenizer.json"), "{").expect("written");
    assert!(matches!(TextProcessor::open(folder.path()), Err(ProcessorError::Parse { .. })));
}

#[test]
fn a_stream_holds_half_characters_back() {
    let (_folder, processor) = byte_level();
    let mut stream = processor.stream();
    let pieces: Vec<String> = "é🎉!".bytes().map(|byte| stream.push(byte.into()).expect("text")).collect();
    assert_eq!(pieces, ["", "é", "", "", "", "🎉", "!"]);
    assert_eq!(stream.push(0xF0).expect("text"), "");
    assert_eq!(stream.finish().expect("text"), "\u{fffd}");
    assert_eq!(stream.finish().expect("text"), "");
    let llama = llava_text();
    let mut stream = llama.stream();
    let mut ids = llama.encode("日x", false).expect("ids");
    ids.push(2);
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).expect("text")).collect();
    let shown: Vec<&str> = pieces.iter().map(String::as_str).filter(|piece| !piece.is_empty()).collect();
    assert_eq!(shown, ["日", "x"]);
}

proptest! {
    #[test]
    fn streams_and_round_trips_equal_the_whole(prompt in "(\\PC|[a-z ]|[🎉🇫🇷é日\n]){0,40}") {
        let llama = llava_text();
        let ids = llama.encode(&prompt, true).expect("ids");
        let whole = llama.decode(&ids).expect("text");
        prop_assert_eq!(streamed(&llama, &ids), &*whole);
        let (_folder, bytes) = byte_level();
        let ids = bytes.encode(&prompt, true).expect("ids");
        prop_assert_eq!(bytes.decode(&ids).expect("text"), &*prompt);
        prop_assert_eq!(streamed(&bytes, &ids), &*prompt);
    }

    #[test]
    fn any_ids_stream_without_an_error(ids in proptest::collection::vec(0u32..500, 0..60)) {
        streamed(&llava_text(), &ids);
        let (_folder, bytes) = byte_level();
        prop_assert_eq!(streamed(&bytes, &ids), bytes.decode(&ids).expect("text"));
    }
}
