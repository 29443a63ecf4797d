//! Shapes of models on the hub, each the contents of its config.json.
use super::SynthError;
use crate::checkpoint::nearest;
use serde_json::Value;
use std::cmp::Reverse;
use std::path::{Path, PathBuf};

/// Name, and config.json as on the hub.
const SHAPES: [(&str, &str); 13] = [
    // llava-hf/llava-1.5-7b-hf
    ("llava-1.5-7b", include_str!("shapes/llava-1.5-7b.json")),
    // llava-hf/llava-1.5-13b-hf
    ("llava-1.5-13b", include_str!("shapes/llava-1.5-13b.json")),
    // Efficient-Large-Model/VILA1.5-3b, put together from its parts: Sheared-LLaMA-2.7B, siglip-so400m-patch14-384
    ("vila1.5-3b", include_str!("shapes/vila1.5-3b.json")),
    // meta-llama/Llama-2-7b-hf
    ("llama-2-7b", include_str!("shapes/llama-2-7b.json")),
    // meta-llama/Llama-2-13b-hf
    ("llama-2-13b", include_str!("shapes/llama-2-13b.json")),
    // meta-llama/Llama-3.1-8B
    ("llama-3.1-8b", include_str!("shapes/llama-3.1-8b.json")),
    // TinyLlama/TinyLlama-1.1B-Chat-v1.0
    ("tinyllama-1.1b", include_str!("shapes/tinyllama-1.1b.json")),
    // HuggingFaceTB/SmolLM2-135M
    ("smollm2-135m", include_str!("shapes/smollm2-135m.json")),
    // facebook/opt-2.7b
    ("opt-2.7b", include_str!("shapes/opt-2.7b.json")),
    // google/flan-t5-xl
    ("flan-t5-xl", include_str!("shapes/flan-t5-xl.json")),
    // Salesforce/blip2-flan-t5-xl
    ("blip2-flan-t5-xl", include_str!("shapes/blip2-flan-t5-xl.json")),
    // Salesforce/blip2-opt-2.7b
    ("blip2-opt-2.7b", include_str!("shapes/blip2-opt-2.7b.json")),
    // facebook/nougat-base
    ("nougat-base", include_str!("shapes/nougat-base.json")),
];

/// The config of a known shape, of a config.json, or of the folder of one. A known name wins over a path, as runs leave
/// folders of that name behind; `./NAME` is the path.
///
/// # Errors
/// A name that is neither, with the known ones; a file that is unreadable or no JSON.
pub fn find(name: &str) -> Result<Value, SynthError> {
    if let Some((_, config)) = SHAPES.iter().find(|(known, _)| *known == name) {
        return parse(Path::new(name), config.as_bytes());
    }
    let path = PathBuf::from(name);
    let path = match path.is_dir() {
        true => path.join("config.json"),
        false if path.exists() => path,
        false => return Err(SynthError::Unknown { name: name.to_owned(), known: by_likeness(name) }),
    };
    let content = std::fs::read(&path).map_err(|source| SynthError::Read { path: path.clone(), source })?;
    parse(&path, &content)
}

fn parse(path: &Path, content: &[u8]) -> Result<Value, SynthError> {
    serde_json::from_slice(content).map_err(|source| SynthError::Json { path: path.to_owned(), source })
}

/// The known names, those first that are most like `name`: by a slip of the hand, then by how they start.
fn by_likeness(name: &str) -> Vec<&'static str> {
    let name = name.to_ascii_lowercase();
    let mut known: Vec<&'static str> = SHAPES.iter().map(|(known, _)| *known).collect();
    let slip = nearest(&name, known.iter().copied());
    let start = |known: &str| std::iter::zip(known.bytes(), name.bytes()).take_while(|(a, b)| a == b).count();
    known.sort_by_key(|known| (Some(*known) != slip, Reverse(start(known))));
    known
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphs::{DType, Logits, Model, Network};

    /// Values in millions, as the models' cards have them; LLaVA's without the last vision block and the norm behind it,
    /// which never run.
    #[test]
    fn every_shape_has_the_size_that_its_card_names() {
        let millions = |name: &str| {
            let networks =
                Model::from_config(&find(name).unwrap()).unwrap().networks(DType::Float16, Logits::Last).unwrap();
            let mut tensors: Vec<(&str, &[usize])> =
                networks.iter().flat_map(Network::weights).flat_map(|(_, weight)| weight.tensors()).collect();
            tensors.sort_unstable();
            tensors.dedup();
            tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>() / 1_000_000
        };
        let found = SHAPES.map(|(name, _)| (name, millions(name)));
        let wanted = [
            ("llava-1.5-7b", 7063 - 13),
            ("llava-1.5-13b", 13_351 - 13),
            // Sheared-LLaMA 2701.6, SigLIP 428.2 without its last block and head of 15.2 each, the projector 18.4.
            ("vila1.5-3b", 3117),
            ("llama-2-7b", 6738),
            ("llama-2-13b", 13_015),
            ("llama-3.1-8b", 8030),
            ("tinyllama-1.1b", 1100),
            ("smollm2-135m", 134),
            ("opt-2.7b", 2651),
            ("flan-t5-xl", 2849),
            ("blip2-flan-t5-xl", 3942),
            ("blip2-opt-2.7b", 3744),
            // A file of 1.4 GB in float32.
            ("nougat-base", 348),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_wrong_name_lists_the_likely_ones_first() {
        let known = |name: &str| match find(name) {
            Err(SynthError::Unknown { known, .. }) => known,
            other => panic!("{other:?}"),
        };
        assert_eq!(known("lava-1.5-13b")[0], "llava-1.5-13b");
        assert_eq!(known("Llama-3-8B-Instruct")[0], "llama-3.1-8b");
        assert_eq!(known("gpt-2").len(), SHAPES.len());
    }
}
