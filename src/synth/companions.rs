//! The files around the weights: configs, and a tokenizer of bytes that stands in for the model's own.
use super::SynthError;
use graphs::{Entry, Facts, PictureFacts};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

const BYTES: usize = 256;

/// Paths and contents, the folder's own config.json last. `parts` are keys of the config and folders.
pub(super) fn files(config: &Value, facts: &Facts, parts: &[(&str, &str)]) -> Result<Vec<(String, Value)>, SynthError> {
    let tokens = Tokens::new(config, facts)?;
    let place = |key: &str, name: &str| match parts.iter().find(|(part, _)| *part == key) {
        Some((_, folder)) => format!("{folder}/{name}"),
        None => name.to_owned(),
    };
    let mut files = vec![
        (place("llm_cfg", "generation_config.json"), tokens.generation(config)),
        (place("llm_cfg", "tokenizer.json"), tokens.tokenizer()),
        (place("llm_cfg", "tokenizer_config.json"), tokens.settings(facts)),
    ];
    if let Some(pictures) = facts.pictures {
        let vision = config.get("vision_tower_cfg").or(config.get("vision_config"));
        let siglip = vision.and_then(|vision| vision.get("model_type")) == Some(&json!("siglip_vision_model"));
        let settings = match (pictures.entry, siglip) {
            (Entry::Source, _) => page_settings(pictures),
            (Entry::Prompt, true) => siglip_settings(pictures),
            (Entry::Prompt, false) => clip_settings(pictures),
        };
        files.push((place("vision_tower_cfg", "preprocessor_config.json"), settings));
    }
    for (key, _) in parts {
        files.push((place(key, "config.json"), config.get(key).cloned().unwrap_or_default()));
    }
    files.push(("config.json".to_owned(), config.clone()));
    Ok(files)
}

fn page_settings(pictures: PictureFacts) -> Value {
    let [height, width] = pictures.size;
    json!({
        "image_processor_type": "NougatImageProcessor",
        "do_crop_margin": true, "do_align_long_axis": false, "do_thumbnail": true, "do_pad": true,
        "do_resize": true, "size": { "height": height, "width": width }, "resample": 2,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    })
}

fn siglip_settings(pictures: PictureFacts) -> Value {
    let [height, width] = pictures.size;
    json!({
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true, "size": { "height": height, "width": width }, "resample": 3,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    })
}

/// At the size that the vision network takes.
fn clip_settings(pictures: PictureFacts) -> Value {
    let [height, width] = pictures.size;
    json!({
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true, "size": { "shortest_edge": height.max(width) }, "resample": 3,
        "do_center_crop": true, "crop_size": { "height": height, "width": width },
        "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    })
}

/// Which id means what.
struct Tokens {
    special: BTreeMap<usize, &'static str>,
    bytes: Vec<usize>,
    /// Ids of beginning, end, padding and unknown.
    roles: [usize; 4],
}

impl Tokens {
    /// Special tokens have the config's ids; those it does not name and the bytes take the lowest ids left.
    fn new(config: &Value, facts: &Facts) -> Result<Tokens, SynthError> {
        let mut special = BTreeMap::new();
        if let Some(id) = facts.pictures.and_then(|pictures| pictures.token_id) {
            special.insert(id, "<image>");
        }
        let mut take = |key: &str, text: &'static str, default: Option<usize>| {
            let free = |special: &BTreeMap<usize, _>| (0..).find(|id| !special.contains_key(id)).unwrap_or_default();
            let id = id_of(config, key).or(default).unwrap_or_else(|| free(&special));
            // Some models begin and end with the same token.
            special.entry(id).or_insert(text);
            id
        };
        let roles = [
            take("bos_token_id", "<s>", Some(1)),
            take("eos_token_id", "</s>", Some(2)),
            take("pad_token_id", "<pad>", None),
            take("unk_token_id", "<unk>", None),
        ];
        let bytes: Vec<usize> = (0..).filter(|id| !special.contains_key(id)).take(BYTES).collect();
        match bytes.last() {
            Some(&last) if last < facts.vocab => Ok(Tokens { special, bytes, roles }),
            _ => Err(SynthError::Vocabulary { found: facts.vocab, wanted: BYTES + special.len() }),
        }
    }

    fn text(&self, role: usize) -> &'static str {
        self.special.get(&self.roles[role]).copied().unwrap_or_default()
    }

    fn generation(&self, config: &Value) -> Value {
        // All end tokens, where the config lists several.
        let end = value_of(config, "eos_token_id").cloned().unwrap_or_else(|| json!(self.roles[1]));
        json!({ "bos_token_id": self.roles[0], "eos_token_id": end, "pad_token_id": self.roles[2] })
    }

    fn settings(&self, facts: &Facts) -> Value {
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.text(0), "eos_token": self.text(1), "pad_token": self.text(2), "unk_token": self.text(3),
            "model_max_length": facts.max_positions,
            "clean_up_tokenization_spaces": false,
        })
    }

    /// A tokenizer of byte-level BPE without merges. Special tokens are in the vocabulary too: only so do they get
    /// ids that do not follow on the last byte's.
    fn tokenizer(&self) -> Value {
        let added = |(&id, text): (&usize, &&str)| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        };
        let added: Vec<Value> = self.special.iter().map(added).collect();
        let mut vocabulary: BTreeMap<usize, String> =
            std::iter::zip(&self.bytes, letters()).map(|(&id, letter)| (id, letter.to_string())).collect();
        vocabulary.extend(self.special.iter().map(|(&id, &text)| (id, text.to_owned())));
        let vocabulary = Map::from_iter(vocabulary.into_iter().map(|(id, text)| (text, json!(id))));
        let (begin, id) = (self.text(0), self.roles[0]);
        let first = |kind: u8| json!({ "SpecialToken": { "id": begin, "type_id": kind } });
        let sequence = |name: &str, kind: u8| json!({ "Sequence": { "id": name, "type_id": kind } });
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [first(0), sequence("A", 0)],
                "pair": [first(0), sequence("A", 0), first(1), sequence("B", 1)],
                "special_tokens": { begin: { "id": begin, "ids": [id], "tokens": [begin] } },
            },
            "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocabulary, "merges": [],
            },
        })
    }
}

/// A key of the language part, else of the whole config; null counts as missing.
fn value_of<'c>(config: &'c Value, key: &str) -> Option<&'c Value> {
    let parts = [config.get("text_config"), config.get("llm_cfg"), config.get("decoder"), Some(config)];
    parts.into_iter().flatten().filter_map(|part| part.get(key)).find(|value| !value.is_null())
}

fn id_of(config: &Value, key: &str) -> Option<usize> {
    let value = value_of(config, key)?;
    let first = value.get(0).unwrap_or(value);
    first.as_u64().and_then(|id| usize::try_from(id).ok())
}

/// The letter that stands for each byte in byte-level BPE (GPT-2): the byte itself where it can be seen, else the next
/// letter beyond 255.
fn letters() -> Vec<char> {
    let mut beyond = 255;
    let letter = |byte: u8| {
        if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            return char::from(byte);
        }
        beyond += 1;
        char::from_u32(beyond).unwrap_or_default()
    };
    (0..=u8::MAX).map(letter).collect()
}
