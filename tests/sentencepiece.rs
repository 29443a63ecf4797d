//! `tokenizer.model` files against SentencePiece's own ids, and files that are none.
#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::fixture;
use serde_json::Value;
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

fn model() -> Vec<u8> {
    std::fs::read(fixture("sentencepiece").join("tokenizer.model")).expect("read")
}

fn golden() -> Vec<(String, Vec<u32>)> {
    let text = std::fs::read_to_string(fixture("sentencepiece").join("golden.json")).expect("read");
    let parsed: Vec<Value> = serde_json::from_str(&text).expect("json");
    let ids = |row: &Value| serde_json::from_value(row["ids"].clone()).expect("ids");
    parsed.iter().map(|row| (row["text"].as_str().expect("text").to_owned(), ids(row))).collect()
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
    let wanted = "wanted byte pairs of text that is left as it is";
    // A piece `a`, then a trainer (field 2) and a normalizer (field 3).
    let file = |rest: &[u8]| [&[0x0a, 3, 0x0a, 1, b'a'], rest].concat();
    let cases: [(Vec<u8>, String); 9] = [
        (vec![], "found no pieces, wanted a SentencePiece model".into()),
        (b"{\"version\"".to_vec(), "found a field of wire type `3`, wanted a SentencePiece model".into()),
        (model()[..100].to_vec(), "the file ends in the middle of a field".into()),
        (
            vec![0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            "found a number of more than ten bytes, wanted a SentencePiece model".into(),
        ),
        (file(&[]), format!("found a SentencePiece model of type `1`, {wanted}; {hint}")),
        (file(&[0x12, 2, 0x18, 2]), format!("found a SentencePiece model that changes its text, {wanted}; {hint}")),
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
