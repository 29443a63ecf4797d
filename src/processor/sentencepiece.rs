//! SentencePiece's `tokenizer.model` (`sentencepiece_model.proto`, a protocol buffer), as the JSON of a tokenizer.
//!
//! Byte-pair models that leave their text as it is, which is what LLaMA's are, and unigram models, which is what T5's are
//! (`spiece.model` there). As in transformers' `convert_slow_tokenizer.py` a piece of byte pairs is merged from any two
//! pieces that make it, and its score is their rank.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::unigram;

/// What SentencePiece writes for a blank.
const BLANK: &str = "\u{2581}";
/// In the name of a T5 tokenizer's class.
const T5: &str = "T5Tokenizer";
/// More tokens than any model has beside its pieces.
const MOST_EXTRA: u64 = 1 << 16;
const HINT: &str = "hint: save the checkpoint's tokenizer.json with transformers";

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

/// What of the file matters; the defaults are the format's.
struct Model {
    pieces: Vec<Piece>,
    /// 1 is unigram, 2 byte-pair.
    algorithm: u64,
    adds_blank: bool,
    removes_blanks: bool,
    /// Blanks become [`BLANK`].
    marks_blanks: bool,
    /// Blanks belong to the word before them.
    blanks_last: bool,
    /// What text is normalized by; empty where it is left as it is.
    table: Vec<u8>,
}

/// The `tokenizer.json` of a `tokenizer.model`; what stands around a text is what `tokenizer_config.json` asks for, and
/// where that says nothing what T5 does (`t5`, or its class) or LLaMA.
///
/// # Errors
/// The bytes are no such file, or it holds a model of another algorithm.
pub(super) fn tokenizer(bytes: &[u8], config: Option<&Value>, t5: bool) -> Result<Value, String> {
    let model = Model::parse(bytes)?;
    let wanted = "wanted a unigram model, or byte pairs of text that is left as it is";
    let unigram = match model.algorithm {
        1 => true,
        2 => false,
        other => return Err(format!("found a SentencePiece model of type `{other}`, {wanted}; {HINT}")),
    };
    let changes = !unigram && (!model.table.is_empty() || model.removes_blanks);
    if changes || !model.marks_blanks || model.blanks_last {
        return Err(format!("found a SentencePiece model that treats its text otherwise, {wanted}; {HINT}"));
    }
    let vocab: HashMap<&str, usize> = model.pieces.iter().enumerate().map(|(id, p)| (p.text.as_str(), id)).collect();
    if vocab.len() != model.pieces.len() {
        return Err("found a piece twice, wanted different ones".into());
    }
    let unknown = model.pieces.iter().position(|piece| piece.kind == Kind::Unknown);
    if unigram && (unknown.is_none() || model.pieces.iter().any(|piece| piece.kind == Kind::Unused)) {
        return Err(format!("found a unigram model without an unknown piece, or with unused ones; {HINT}"));
    }
    let class = config.and_then(|config| config.get("tokenizer_class")?.as_str());
    let t5 = class.map_or(t5, |class| class.starts_with(T5));
    let extra = extra_tokens(config, t5)?;
    let added = model.pieces.iter().enumerate().filter_map(|(id, piece)| {
        let special = matches!(piece.kind, Kind::Control | Kind::Unknown);
        (special || piece.kind == Kind::UserDefined).then(|| added_token(id, &piece.text, special))
    });
    let first = model.pieces.len();
    let extra = extra.iter().enumerate().map(|(place, text)| added_token(first + place, text, true));
    // `legacy` sets a blank before the text after each special token too, not only before the whole.
    let legacy = flag(config, "legacy", true);
    let mut steps = Vec::new();
    if !model.table.is_empty() {
        steps.push(unigram::normalizer(&model.table)?);
    }
    if model.removes_blanks {
        // A blank at the beginning is the one that is added there; without it `Metaspace` would miss the place.
        let left = legacy || !model.adds_blank;
        steps.push(json!({"type": "Strip", "strip_left": left, "strip_right": true}));
        steps.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let splitter = if legacy {
        steps.extend(model.adds_blank.then(|| json!({"type": "Prepend", "prepend": BLANK})));
        steps.push(replace(" ", BLANK));
        Value::Null
    } else {
        let scheme = if model.adds_blank { "first" } else { "never" };
        json!({"type": "Metaspace", "replacement": BLANK, "prepend_scheme": scheme, "split": false})
    };
    let normalizer = if steps.is_empty() { Value::Null } else { json!({"type": "Sequence", "normalizers": steps}) };
    let bytes = model.pieces.iter().any(|piece| piece.kind == Kind::Byte);
    let mut decoders = vec![replace(BLANK, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if model.adds_blank {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "added_tokens": added.chain(extra).collect::<Vec<_>>(),
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": around(&vocab, config, t5)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": match unigram {
            true => json!({
                "type": "Unigram", "unk_id": unknown, "byte_fallback": bytes,
                "vocab": model.pieces.iter().map(|piece| (&piece.text, piece.score)).collect::<Vec<_>>(),
            }),
            false => json!({
                "type": "BPE", "unk_token": unknown.map(|id| &model.pieces[id].text), "fuse_unk": true,
                "byte_fallback": bytes, "vocab": vocab, "merges": merges(&model.pieces),
            }),
        },
    }))
}

fn added_token(id: usize, text: &str, special: bool) -> Value {
    json!({"id": id, "content": text, "special": special, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false})
}

/// T5's tokens behind the pieces, counted down.
fn extra_tokens(config: Option<&Value>, t5: bool) -> Result<Vec<String>, String> {
    let asked = config.and_then(|config| config.get("extra_ids")).filter(|value| !value.is_null());
    let count = match asked {
        None if t5 => 100,
        None => 0,
        Some(value) => value.as_u64().filter(|&count| count <= MOST_EXTRA).ok_or_else(|| {
            format!("found `{value}` as extra_ids of tokenizer_config.json, wanted a number up to {MOST_EXTRA}")
        })?,
    };
    Ok((0..count).rev().map(|number| format!("<extra_id_{number}>")).collect())
}

/// Pairs of pieces in the order in which they are to be merged.
fn merges(pieces: &[Piece]) -> Vec<(&str, &str)> {
    let normal = pieces.iter().enumerate().filter(|(_, piece)| piece.kind == Kind::Normal);
    let known: HashMap<&str, (usize, f32)> =
        normal.map(|(id, piece)| (piece.text.as_str(), (id, piece.score))).collect();
    let mut ranked = Vec::new();
    for (whole, &(id, score)) in &known {
        for (at, _) in whole.char_indices().skip(1) {
            let (left, right) = whole.split_at(at);
            if let (Some((first, _)), Some((second, _))) = (known.get(left), known.get(right)) {
                ranked.push((score, id, first, second, (left, right)));
            }
        }
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    ranked.into_iter().map(|(.., pair)| pair).collect()
}

/// The begin and end tokens that `LlamaTokenizer` or `T5Tokenizer` puts around a text.
fn around(vocab: &HashMap<&str, usize>, config: Option<&Value>, t5: bool) -> Result<Value, String> {
    let token = |name: &str, default: &str| {
        let token = config.and_then(|config| super::text::special_token(config, name));
        let token = token.unwrap_or_else(|| default.to_owned());
        match vocab.get(token.as_str()) {
            Some(id) => Ok((token, *id)),
            None => Err(format!("found no piece `{token}`, which is the {name}")),
        }
    };
    let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
    let mut special = serde_json::Map::new();
    let asked = [
        ("bos_token", "<s>", flag(config, "add_bos_token", !t5)),
        ("eos_token", "</s>", flag(config, "add_eos_token", t5)),
    ];
    for (name, default, _) in asked.iter().filter(|(.., asked)| *asked) {
        let (token, id) = token(name, default)?;
        let at = if *name == "bos_token" { 0 } else { single.len() };
        single.insert(at, json!({"SpecialToken": {"id": token, "type_id": 0}}));
        special.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    let pair = [single.clone(), vec![json!({"Sequence": {"id": "B", "type_id": 0}})]].concat();
    Ok(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}))
}

fn flag(config: Option<&Value>, name: &str, default: bool) -> bool {
    config.and_then(|config| config.get(name)?.as_bool()).unwrap_or(default)
}

impl Model {
    fn parse(bytes: &[u8]) -> Result<Model, String> {
        let mut model = Model {
            pieces: Vec::new(),
            algorithm: 1,
            adds_blank: true,
            removes_blanks: true,
            marks_blanks: true,
            blanks_last: false,
            table: Vec::new(),
        };
        let mut fields = Fields(bytes);
        while let Some(field) = fields.next()? {
            match field {
                (1, Wire::Bytes(piece)) => model.pieces.push(Piece::parse(piece)?),
                (2, Wire::Bytes(trainer)) => {
                    let mut fields = Fields(trainer);
                    while let Some(field) = fields.next()? {
                        match field {
                            (3, Wire::Number(algorithm)) => model.algorithm = algorithm,
                            (24, Wire::Number(flag)) => model.blanks_last = flag != 0,
                            _ => {}
                        }
                    }
                }
                (3, Wire::Bytes(normalizer)) => {
                    let mut fields = Fields(normalizer);
                    while let Some(field) = fields.next()? {
                        match field {
                            (2, Wire::Bytes(map)) => model.table = map.to_vec(),
                            (3, Wire::Number(flag)) => model.adds_blank = flag != 0,
                            (4, Wire::Number(flag)) => model.removes_blanks = flag != 0,
                            (5, Wire::Number(flag)) => model.marks_blanks = flag != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        match model.pieces.is_empty() {
            true => Err("found no pieces, wanted a SentencePiece model".into()),
            false => Ok(model),
        }
    }
}

impl Piece {
    fn parse(bytes: &[u8]) -> Result<Piece, String> {
        let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
        let mut fields = Fields(bytes);
        while let Some(field) = fields.next()? {
            match field {
                (1, Wire::Bytes(text)) => {
                    piece.text = String::from_utf8(text.to_vec()).map_err(|_| "found a piece that is not UTF-8")?;
                }
                (2, Wire::Float(score)) => piece.score = score,
                (3, Wire::Number(kind)) => {
                    piece.kind = match kind {
                        1 => Kind::Normal,
                        2 => Kind::Unknown,
                        3 => Kind::Control,
                        4 => Kind::UserDefined,
                        5 => Kind::Unused,
                        6 => Kind::Byte,
                        _ => return Err(format!("found a piece of type `{kind}`, wanted 1 to 6")),
                    };
                }
                _ => {}
            }
        }
        Ok(piece)
    }
}

/// A field's value as it lies in the file (protobuf.dev, "Encoding").
enum Wire<'a> {
    Number(u64),
    Float(f32),
    Bytes(&'a [u8]),
    Double,
}

/// The fields of a message, by their numbers.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Wire<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.number()?;
        let wire = match key & 7 {
            0 => Wire::Number(self.number()?),
            1 => self.take(8).map(|_| Wire::Double)?,
            2 => {
                let length = self.number()?;
                Wire::Bytes(self.take(usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            5 => Wire::Float(self.take(4)?.try_into().map(f32::from_le_bytes).map_err(|_| "cut off")?),
            kind => return Err(format!("found a field of wire type `{kind}`, wanted a SentencePiece model")),
        };
        Ok(Some((key >> 3, wire)))
    }

    fn number(&mut self) -> Result<u64, String> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("found a number of more than ten bytes, wanted a SentencePiece model".into())
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or("the file ends in the middle of a field")?;
        self.0 = rest;
        Ok(taken)
    }
}
