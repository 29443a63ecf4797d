//! SentencePiece's `tokenizer.model` (`sentencepiece_model.proto`, a protocol buffer), as the JSON of a tokenizer.
//!
//! Only byte-pair models that leave their text as it is, which is what LLaMA's are. As in transformers'
//! `convert_slow_tokenizer.py` a piece is merged from any two pieces that make it, and its score is their rank.

use std::collections::HashMap;

use serde_json::{Value, json};

/// What SentencePiece writes for a blank.
const BLANK: &str = "\u{2581}";
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
    normalizes: bool,
}

/// The `tokenizer.json` of a `tokenizer.model`; what stands around a text is what `tokenizer_config.json` asks for.
///
/// # Errors
/// The bytes are no such file, or it holds a model of another algorithm.
pub(super) fn tokenizer(bytes: &[u8], config: Option<&Value>) -> Result<Value, String> {
    let model = Model::parse(bytes)?;
    let wanted = "wanted byte pairs of text that is left as it is";
    if model.algorithm != 2 {
        return Err(format!("found a SentencePiece model of type `{}`, {wanted}; {HINT}", model.algorithm));
    }
    if model.normalizes || model.removes_blanks || !model.marks_blanks || model.blanks_last {
        return Err(format!("found a SentencePiece model that treats its text otherwise, {wanted}; {HINT}"));
    }
    let vocab: HashMap<&str, usize> = model.pieces.iter().enumerate().map(|(id, p)| (p.text.as_str(), id)).collect();
    if vocab.len() != model.pieces.len() {
        return Err("found a piece twice, wanted different ones".into());
    }
    let unknown = model.pieces.iter().find(|piece| piece.kind == Kind::Unknown).map(|piece| &piece.text);
    let added = model.pieces.iter().enumerate().filter_map(|(id, piece)| {
        let special = matches!(piece.kind, Kind::Control | Kind::Unknown);
        (special || piece.kind == Kind::UserDefined).then(|| {
            json!({"id": id, "content": piece.text, "special": special, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        })
    });
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    // `legacy` sets a blank before the text after each special token too, not only before the whole.
    let legacy = flag(config, "legacy", true);
    let (normalizer, splitter) = if legacy {
        let prepend = model.adds_blank.then(|| json!({"type": "Prepend", "prepend": BLANK}));
        let steps: Vec<Value> = prepend.into_iter().chain([replace(" ", BLANK)]).collect();
        (json!({"type": "Sequence", "normalizers": steps}), Value::Null)
    } else {
        let scheme = if model.adds_blank { "first" } else { "never" };
        let splitter = json!({"type": "Metaspace", "replacement": BLANK, "prepend_scheme": scheme, "split": false});
        (Value::Null, splitter)
    };
    let mut decoders = vec![replace(BLANK, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if model.adds_blank {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": around(&vocab, config)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "unk_token": unknown, "fuse_unk": true,
            "byte_fallback": model.pieces.iter().any(|piece| piece.kind == Kind::Byte),
            "vocab": vocab, "merges": merges(&model.pieces),
        },
    }))
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

/// The begin and end tokens that `LlamaTokenizer` puts around a text.
fn around(vocab: &HashMap<&str, usize>, config: Option<&Value>) -> Result<Value, String> {
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
        ("bos_token", "<s>", flag(config, "add_bos_token", true)),
        ("eos_token", "</s>", flag(config, "add_eos_token", false)),
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
            normalizes: false,
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
                            (2, Wire::Bytes(map)) => model.normalizes = !map.is_empty(),
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
