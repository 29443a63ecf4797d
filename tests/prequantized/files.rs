//! The folders of fixtures/peers as whole checkpoints, changed where a test wants it.
use crate::common::fixture;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// A tensor of a file: type as in safetensors, shape, bytes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Raw {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) type Raws = BTreeMap<String, Raw>;

pub(crate) fn read(path: &Path) -> Raws {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let raw = |view: safetensors::tensor::TensorView<'_>| Raw {
        dtype: format!("{:?}", view.dtype()),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    };
    file.iter().map(|(name, view)| (name.to_owned(), raw(view))).collect()
}

pub(crate) fn write(path: &Path, tensors: &Raws) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, raw) in tensors {
        let offsets = [data.len(), data.len() + raw.bytes.len()];
        header.insert(name.clone(), json!({ "dtype": raw.dtype, "shape": raw.shape, "data_offsets": offsets }));
        data.extend_from_slice(&raw.bytes);
    }
    let header = Value::Object(header).to_string().into_bytes();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat()).unwrap();
}

/// Writes a peer with the embedding and the head that all share, as two shards, after `change` of its own tensors.
pub(crate) fn peer(name: &str, folder: &Path, change: impl FnOnce(&mut Raws)) {
    let from = fixture("peers").join(name);
    std::fs::create_dir_all(folder).unwrap();
    for file in ["config.json", "hf_quant_config.json"] {
        if let Ok(text) = std::fs::read(from.join(file)) {
            std::fs::write(folder.join(file), text).unwrap();
        }
    }
    let shared = read(&fixture("peers/shared.safetensors"));
    let mut own = read(&from.join("quantized.safetensors"));
    change(&mut own);
    let mut map = Map::new();
    for (file, tensors) in [("model-00001-of-00002.safetensors", &shared), ("model-00002-of-00002.safetensors", &own)] {
        write(&folder.join(file), tensors);
        map.extend(tensors.keys().map(|name| (name.clone(), json!(file))));
    }
    let index = json!({ "metadata": {}, "weight_map": map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
