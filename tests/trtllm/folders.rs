//! NVIDIA's folders in fixtures/peers as whole checkpoints, changed where a test wants it.
use crate::common::{fixture, succeed};
use crate::files::{Raw, Raws, read, write};
use serde_json::Value;
use std::path::Path;

pub(crate) const QUANTIZED: [&str; 4] =
    ["trtllm-tp1-w8a16", "trtllm-tp1-w4a16-awq", "trtllm-tp2-w4a16-awq", "trtllm-tp1-w8a8-sq"];

const SHARED: [(&str, &str); 2] =
    [("transformer.vocab_embedding.weight", "model.embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")];

/// The model that NVIDIA's exporter was given.
pub(crate) fn base(folder: &Path) {
    let from = fixture("peers/base");
    std::fs::create_dir_all(folder).unwrap();
    std::fs::copy(from.join("config.json"), folder.join("config.json")).unwrap();
    let mut tensors = read(&from.join("layers.safetensors"));
    tensors.extend(read(&fixture("peers/shared.safetensors")));
    write(&folder.join("model.safetensors"), &tensors);
}

/// A quantized folder with its embedding and head, after `change` of each rank's tensors.
pub(crate) fn ranks(name: &str, folder: &Path, change: impl Fn(usize, &mut Raws)) {
    let from = fixture("peers").join(name);
    std::fs::create_dir_all(folder).unwrap();
    std::fs::copy(from.join("config.json"), folder.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    let count = config["mapping"]["tp_size"].as_u64().unwrap() as usize;
    let shared = read(&fixture("peers/shared.safetensors"));
    for rank in 0..count {
        let file = format!("rank{rank}.safetensors");
        let mut tensors = read(&from.join(&file));
        for (to, from) in SHARED {
            let Raw { dtype, shape, bytes } = &shared[from];
            let part = bytes.len() / count;
            let (shape, bytes) = (vec![shape[0] / count, shape[1]], bytes[rank * part..][..part].to_vec());
            tensors.insert(to.into(), Raw { dtype: dtype.clone(), shape, bytes });
        }
        change(rank, &mut tensors);
        write(&folder.join(file), &tensors);
    }
}

pub(crate) fn convert(model: &Path, output: &Path, count: usize) {
    let count = count.to_string();
    succeed(&["convert", model.to_str().unwrap(), "-o", output.to_str().unwrap(), "--tp", &count, "-q"]);
}

/// The tensors of all ranks.
pub(crate) fn rank_files(folder: &Path) -> Vec<Raws> {
    let file = |rank: usize| folder.join(format!("rank{rank}.safetensors"));
    (0..).map(file).take_while(|file| file.exists()).map(|file| read(&file)).collect()
}
