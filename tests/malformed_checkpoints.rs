//! Checkpoints that must be refused, each with its exact message, and those that must open.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#[path = "malformed_checkpoints/cases.rs"]
mod cases;

use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use trtvlm::checkpoint::{Checkpoint, CheckpointError, HubSettings, Options, open_weights};

const FIXTURES: [&str; 3] = ["llava-hf", "llava-v4names", "llava-v5names"];
const NORM: &str = "language_model.model.norm.weight";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// A copy of llava-hf, without its golden.
fn copy(folder: &Path) {
    for name in ["config.json", "model.safetensors", "generation_config.json"] {
        fs::copy(fixture("llava-hf").join(name), folder.join(name)).unwrap();
    }
}

/// The header and the data of a safetensors file.
fn split(path: &Path) -> (Value, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

fn write(path: &Path, header: &str, data: &[u8]) {
    let parts = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data];
    fs::write(path, parts.concat()).unwrap();
}

/// Splits the model into two shards by the parity of the tensor's place, with an index.
fn shard(folder: &Path) -> Value {
    const NAMES: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let (entries, data) = split(&folder.join("model.safetensors"));
    let mut shards = [(json!({}), Vec::new()), (json!({}), Vec::new())];
    let mut map = json!({});
    let tensors = entries.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    for (place, (name, entry)) in tensors.enumerate() {
        let offset = |end: usize| entry["data_offsets"][end].as_u64().unwrap() as usize;
        let (header, bytes) = &mut shards[place % 2];
        let begin = bytes.len();
        bytes.extend_from_slice(&data[offset(0)..offset(1)]);
        header[name] = entry.clone();
        header[name]["data_offsets"] = json!([begin, bytes.len()]);
        map[name] = NAMES[place % 2].into();
    }
    for (name, (header, bytes)) in NAMES.iter().zip(&shards) {
        write(&folder.join(name), &header.to_string(), bytes);
    }
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    let index = json!({"metadata": {"total_size": data.len()}, "weight_map": map});
    write_index(folder, &index);
    index
}

fn write_index(folder: &Path, index: &Value) {
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// An error and its causes on one line, as the command line prints them on several.
fn chain(error: &CheckpointError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[test]
fn malformed_checkpoints_are_refused_with_their_message() {
    let mut wrong = Vec::new();
    for (name, damage, wanted) in cases::CASES {
        let temporary = tempfile::tempdir().unwrap();
        copy(temporary.path());
        damage(temporary.path());
        let found = match Checkpoint::open_folder(temporary.path()) {
            Ok(_) => "opened".to_owned(),
            Err(error) => chain(&error).replace(temporary.path().to_str().unwrap(), "DIR"),
        };
        if found != *wanted {
            wrong.push(format!("{name}\n  found  {found}\n  wanted {wanted}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn fixtures_open_and_read() {
    for name in FIXTURES {
        let checkpoint = Checkpoint::open_folder(&fixture(name)).unwrap();
        assert_eq!(checkpoint.tensors().len(), 80, "{name}");
        assert_eq!(checkpoint.config()["model_type"], "llava");
        assert!(checkpoint.json("generation_config.json").unwrap().unwrap().is_object());
        assert_eq!(checkpoint.json("no_such.json").unwrap(), None);
        assert_eq!(checkpoint.warnings(), Vec::<String>::new());
        assert!(checkpoint.tensors().is_sorted_by_key(|(name, _)| name));
        let bytes = fs::read(fixture(name).join("model.safetensors")).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, entry) in checkpoint.tensors() {
            let mut buffer = vec![0; entry.bytes as usize];
            checkpoint.read_into(name, 0, &mut buffer).unwrap();
            let view = theirs.tensor(name).unwrap();
            assert_eq!((&buffer[..], &entry.shape[..]), (view.data(), view.shape()), "{name}");
        }
        checkpoint.unchanged().unwrap();
    }
}

#[test]
fn two_shards_read_as_one_file() {
    let temporary = tempfile::tempdir().unwrap();
    copy(temporary.path());
    shard(temporary.path());
    let whole = open_weights(&fixture("llava-hf")).unwrap();
    let sharded = open_weights(temporary.path()).unwrap();
    assert_eq!((sharded.tensors().len(), sharded.files().len()), (80, 2));
    for (name, entry) in whole.tensors() {
        let (mut left, mut right) = (vec![0; entry.bytes as usize - 4], vec![0; entry.bytes as usize - 4]);
        whole.read_into(name, 4, &mut left).unwrap();
        sharded.read_into(name, 4, &mut right).unwrap();
        assert_eq!(left, right, "{name}");
    }
}

#[test]
fn fourteen_gigabytes_open_at_once() {
    let temporary = tempfile::tempdir().unwrap();
    copy(temporary.path());
    let path = temporary.path().join("model.safetensors");
    let rows: u64 = 7 << 30;
    write(&path, &json!({"a": {"dtype": "F16", "shape": [rows], "data_offsets": [0, 2 * rows]}}).to_string(), &[]);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() + 2 * rows).unwrap();
    let start = std::time::Instant::now();
    let checkpoint = Checkpoint::open_folder(temporary.path()).unwrap();
    assert!(start.elapsed().as_millis() < 1000, "{:?}", start.elapsed());
    println!("opened in {:?}", start.elapsed());
    let mut end = [1; 16];
    checkpoint.read_into("a", 2 * rows - 16, &mut end).unwrap();
    assert_eq!(end, [0; 16]);
}

#[test]
fn reading_says_what_is_wrong() {
    let temporary = tempfile::tempdir().unwrap();
    copy(temporary.path());
    let path = temporary.path().join("model.safetensors");
    let checkpoint = Checkpoint::open_folder(temporary.path()).unwrap();
    let message = |error: CheckpointError| {
        let hint = error.hint().unwrap_or_default();
        format!("{}; {hint}", chain(&error)).replace(temporary.path().to_str().unwrap(), "DIR")
    };
    let read = |name: &str, offset| message(checkpoint.read_into(name, offset, &mut [0; 8]).unwrap_err());
    let wanted = format!("`DIR` has no tensor `language_model.model.norm.wieght`; did you mean `{NORM}`?");
    assert_eq!(read("language_model.model.norm.wieght", 0), wanted);
    let wanted = format!("bytes 188..196 of tensor `{NORM}` in `DIR/model.safetensors` were asked for, it has 192; ");
    assert_eq!(read(NORM, 188), wanted);
    assert!(read(NORM, u64::MAX).starts_with("bytes 18446744073709551615..18446744073709551623 of"));

    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(9000).unwrap();
    let offset = checkpoint.tensor(NORM).unwrap().offset;
    let wanted = format!(
        "cannot read 8 bytes at byte {offset} of `DIR/model.safetensors`, tensor `{NORM}`: failed to fill whole buffer; "
    );
    assert_eq!(read(NORM, 0), wanted);
    let changed = || message(checkpoint.unchanged().unwrap_err());
    let hint = "build again, while nothing writes to the checkpoint";
    let start = "`DIR/model.safetensors` was changed since it was opened";
    assert_eq!(changed(), format!("{start}: 9000 bytes found, 506208 wanted; {hint}"));
    fs::rename(&path, temporary.path().join("old")).unwrap();
    assert_eq!(changed(), format!("{start}: No such file or directory (os error 2); {hint}"));
    fs::copy(fixture("llava-hf").join("model.safetensors"), &path).unwrap();
    assert_eq!(changed(), format!("{start}: another file is there now; {hint}"));
}

#[test]
fn code_in_a_checkpoint_is_named_and_never_run() {
    let temporary = tempfile::tempdir().unwrap();
    copy(temporary.path());
    fs::write(temporary.path().join("modeling.py"), "raise SystemExit").unwrap();
    fs::write(temporary.path().join("config.json"), r#"{"auto_map": {"AutoModel": "modeling.Model"}}"#).unwrap();
    let warnings = Checkpoint::open_folder(temporary.path()).unwrap().warnings();
    assert_eq!(
        warnings,
        ["config.json asks for code of its own (`auto_map`), which is never run", "`modeling.py` is never run"]
    );
}

/// A hub cache as the hub's tools make it, with llava-hf in it as org/name at main.
fn cache(root: &Path) -> Options<'static> {
    let entry = root.join("models--org--name");
    let snapshot = entry.join("snapshots/c0ffee");
    for folder in [&snapshot, &entry.join("blobs"), &entry.join("refs")] {
        fs::create_dir_all(folder).unwrap();
    }
    for (blob, name) in ["config.json", "model.safetensors"].iter().enumerate() {
        fs::copy(fixture("llava-hf").join(name), entry.join(format!("blobs/{blob}"))).unwrap();
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    fs::write(entry.join("refs/main"), "c0ffee").unwrap();
    let variables = [("HF_HUB_CACHE", root.as_os_str().to_owned()), ("HF_HUB_OFFLINE", "1".into())];
    let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    Options { hub: HubSettings::from_variables(find), progress: None }
}

#[test]
fn hub_ids_are_found_in_the_cache() {
    let temporary = tempfile::tempdir().unwrap();
    let mut options = cache(temporary.path());
    for offline in [true, false] {
        // Online too: what the cache holds whole is not asked for.
        options.hub.offline = offline;
        for id in ["org/name", "org/name@main", "hf://org/name", "hf://org/name@c0ffee"] {
            let checkpoint = Checkpoint::open(id, &options).unwrap();
            assert_eq!(checkpoint.tensors().len(), 80);
            assert!(checkpoint.folder().ends_with("models--org--name/snapshots/c0ffee"));
        }
    }
    let here = fixture("llava-hf");
    assert_eq!(Checkpoint::open(here.to_str().unwrap(), &options).unwrap().folder(), here);
}

#[test]
fn ids_that_are_not_there_say_where_was_looked() {
    let temporary = tempfile::tempdir().unwrap();
    let options = cache(temporary.path());
    let message = |model: &str, options: &Options<'_>| {
        let error = Checkpoint::open(model, options).unwrap_err();
        let text = format!("{}; {}", chain(&error), error.hint().unwrap_or_default());
        text.replace(temporary.path().to_str().unwrap(), "DIR")
    };
    for (id, shown, entry) in
        [("org/other", "org/other@main", "org--other"), ("hf://org/name@dev", "org/name@dev", "org--name")]
    {
        let wanted = format!(
            "offline mode is on (HF_HUB_OFFLINE) and `{shown}` is not in the cache: looked in `DIR/models--{entry}`; \
             unset HF_HUB_OFFLINE to download it, or give a folder"
        );
        assert_eq!(message(id, &options), wanted);
    }
    let wanted =
        "is neither a folder nor a hub id; give a folder, or a hub id as `org/name` or `org/name@revision`".to_owned();
    for model in ["./no/such", "gpt2", "hf://../x", "a/b/c", "org/name@../../x"] {
        assert_eq!(message(model, &options), format!("`{model}` {wanted}"));
    }
    let file = fixture("llava-hf").join("model.safetensors");
    let wanted = "is not a folder; give the folder that holds config.json and the weights";
    assert_eq!(message(file.to_str().unwrap(), &options), format!("`{}` {wanted}", file.display()));
    assert_eq!(message("org/name", &Options::default()), "no folder is known for the cache of the hub; set HF_HOME");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Whatever happens to the header's bytes, opening ends with a result and a message.
    #[test]
    fn mutated_headers_never_panic(changes in prop::collection::vec((0usize..9100, any::<u8>()), 1..6), length in 0usize..20_000) {
        let temporary = tempfile::tempdir().unwrap();
        let mut bytes = fs::read(fixture("llava-hf").join("model.safetensors")).unwrap();
        for (place, byte) in changes {
            bytes[place] = byte;
        }
        if length < 9100 {
            bytes.truncate(length);
        }
        fs::write(temporary.path().join("model.safetensors"), bytes).unwrap();
        if let Err(error) = open_weights(temporary.path()) {
            prop_assert!(chain(&error).contains("model.safetensors"));
        }
    }
}
