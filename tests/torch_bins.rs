//! PyTorch's `.bin` files: those that must be refused, each with its exact message, and those that must be read.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#[path = "torch_bins/cases.rs"]
mod cases;
#[path = "torch_bins/writer.rs"]
mod writer;

use graphs::DType;
use proptest::prelude::*;
use serde_json::json;
use std::fs;
use std::path::Path;
use trtvlm::checkpoint::{Checkpoint, open_weights};
use writer::*;

const NAME: &str = "pytorch_model.bin";

fn message(folder: &Path) -> String {
    match open_weights(folder) {
        Ok(_) => "opened".to_owned(),
        Err(error) => error.to_string().replace(folder.to_str().unwrap(), "DIR"),
    }
}

#[test]
fn malformed_files_are_refused_with_their_message() {
    let mut wrong = Vec::new();
    for (name, write, wanted) in cases::CASES {
        let temporary = tempfile::tempdir().unwrap();
        write(&temporary.path().join(NAME));
        let found = message(temporary.path());
        if found != format!("`DIR/{NAME}`: {wanted}") {
            wrong.push(format!("{name}\n  found  {found}\n  wanted {wanted}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn read(folder: &Path, name: &str) -> (DType, Vec<usize>, Vec<u8>) {
    let weights = open_weights(folder).unwrap();
    let entry = weights.tensor(name).unwrap().clone();
    let mut bytes = vec![0; entry.bytes as usize];
    weights.read_into(name, 0, &mut bytes).unwrap();
    (entry.dtype, entry.shape, bytes)
}

fn weights_only(folder: &Path, tensors: &[Tensor]) {
    write_zip(&folder.join(NAME), &records(state_dict(tensors), &cases::storages()), false);
}

#[test]
fn tensors_are_read_in_both_forms_of_the_zip() {
    let temporary = tempfile::tempdir().unwrap();
    for large in [false, true] {
        write_zip(&temporary.path().join(NAME), &cases::good(), large);
        assert_eq!(read(temporary.path(), "a"), (DType::Float32, vec![2, 3], (0..24).collect()));
        assert_eq!(read(temporary.path(), "b"), (DType::Float16, vec![4], (100..108).collect()));
    }
}

#[test]
fn tensors_may_share_a_storage_and_begin_inside_it() {
    let temporary = tempfile::tempdir().unwrap();
    let part =
        |name: &str, first, shape: &[i64]| Tensor { first, elements: 6, ..tensor(name, "FloatStorage", "0", shape) };
    // A dimension of 1 may have any stride.
    let row = Tensor { stride: vec![77, 1], ..part("row", 3, &[1, 3]) };
    let scalar = part("scalar", 5, &[]);
    weights_only(temporary.path(), &[part("whole", 0, &[3, 2]), part("tied", 0, &[6]), row, scalar]);
    let bytes = |name: &str| read(temporary.path(), name);
    assert_eq!(bytes("whole"), (DType::Float32, vec![3, 2], (0..24).collect()));
    assert_eq!(bytes("tied"), (DType::Float32, vec![6], (0..24).collect()));
    assert_eq!(bytes("row"), (DType::Float32, vec![1, 3], (12..24).collect()));
    assert_eq!(bytes("scalar"), (DType::Float32, vec![], (20..24).collect()));
}

/// What `torch.save` writes for a module: an ordered dict with an attribute, parameters, places of the memory used again.
#[test]
fn state_dicts_of_modules_are_read() {
    let temporary = tempfile::tempdir().unwrap();
    let [a, b] = <[Tensor; 2]>::try_from(cases::tensors()).unwrap();
    let parameter = [b"ctorch._utils\n_rebuild_parameter\nq\x01(".to_vec(), value(&a), b"\x88h\x00)RtRq\x02".to_vec()];
    let items = [text("a"), parameter.concat(), text("tied"), b"h\x02".to_vec(), text("b"), value(&b)];
    let versions = [text("_metadata"), b"h\x00)R".to_vec(), text("version"), int(1), b"sr\x03\0\0\0".to_vec()];
    let pickle = [
        b"\x80\x02ccollections\nOrderedDict\nq\x00)R(".to_vec(),
        items.concat(),
        b"u}".to_vec(),
        versions.concat(),
        b"sb.".to_vec(),
    ];
    write_zip(&temporary.path().join(NAME), &records(pickle.concat(), &cases::storages()), false);
    assert_eq!(open_weights(temporary.path()).unwrap().tensors().len(), 3);
    for name in ["a", "tied"] {
        assert_eq!(read(temporary.path(), name), (DType::Float32, vec![2, 3], (0..24).collect()));
    }
}

#[test]
fn every_storage_type_is_read() {
    let types = [
        ("FloatStorage", DType::Float32),
        ("HalfStorage", DType::Float16),
        ("BFloat16Storage", DType::Bfloat16),
        ("IntStorage", DType::Int32),
        ("LongStorage", DType::Int64),
        ("CharStorage", DType::Int8),
        ("ByteStorage", DType::Uint8),
        ("BoolStorage", DType::Bool),
    ];
    for (storage, dtype) in types {
        let temporary = tempfile::tempdir().unwrap();
        let elements = 24 / (dtype.bits() as i64 / 8);
        weights_only(temporary.path(), &[tensor("a", storage, "0", &[elements])]);
        assert_eq!(read(temporary.path(), "a"), (dtype, vec![elements as usize], (0..24).collect()));
    }
}

#[test]
fn fourteen_gigabytes_open_at_once() {
    let temporary = tempfile::tempdir().unwrap();
    let elements: i64 = 7 << 30;
    let tensors = [tensor("a", "HalfStorage", "0", &[elements]), tensor("b", "HalfStorage", "1", &[4])];
    let mut records = records(state_dict(&tensors), &[("0", vec![]), ("1", (100..108).collect())]);
    records[2].hole = 2 * elements as u64;
    write_zip(&temporary.path().join(NAME), &records, false);
    let start = std::time::Instant::now();
    let weights = open_weights(temporary.path()).unwrap();
    assert!(start.elapsed().as_millis() < 1000, "{:?}", start.elapsed());
    println!("opened in {:?}", start.elapsed());
    let mut end = [1; 16];
    weights.read_into("a", 2 * elements as u64 - 16, &mut end).unwrap();
    assert_eq!(end, [0; 16]);
    assert_eq!(read(temporary.path(), "b").2, (100..108).collect::<Vec<u8>>());
}

/// The index, the projector's own file beside the shards, safetensors before all of them.
#[test]
fn files_are_found_in_their_order() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let [a, b] = <[Tensor; 2]>::try_from(cases::tensors()).unwrap();
    let write = |name: &str, tensors: &[Tensor]| {
        write_zip(&folder.join(name), &records(state_dict(tensors), &cases::storages()), false);
    };
    let names = || open_weights(folder).unwrap().tensors().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
    let projector = Tensor { name: "p".into(), ..b.clone() };
    write("mm_projector.bin", std::slice::from_ref(&projector));
    assert_eq!(names(), ["p"]);
    let shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"];
    write(shards[0], &[a]);
    write(shards[1], &[b]);
    let index = folder.join("pytorch_model.bin.index.json");
    fs::write(&index, json!({ "weight_map": { "a": shards[0], "b": shards[1] } }).to_string()).unwrap();
    assert_eq!(names(), ["a", "b", "p"]);
    // What the shards have is not taken from the projector's file.
    write("mm_projector.bin", &[Tensor { first: 1, elements: 4, ..tensor("b", "HalfStorage", "1", &[2]) }]);
    assert_eq!(read(folder, "b"), (DType::Float16, vec![4], (100..108).collect()));
    fs::write(&index, json!({ "weight_map": { "a": shards[1], "b": shards[1] } }).to_string()).unwrap();
    let wanted =
        format!("`DIR/pytorch_model.bin.index.json` places tensor `a` in `{}`, which does not hold it", shards[1]);
    assert_eq!(message(folder), wanted);
    fs::remove_file(folder.join(shards[1])).unwrap();
    let wanted = format!("`DIR/pytorch_model.bin.index.json` names shards that are missing: `{}`", shards[1]);
    assert_eq!(message(folder), wanted);

    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llava-hf");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures.join(name), folder.join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open_folder(folder).unwrap();
    assert_eq!((checkpoint.tensors().len(), checkpoint.warnings().len()), (80, 0));
    let note = "weights are read from safetensors; the PyTorch files beside them, as `mm_projector.bin`, are not";
    assert_eq!(checkpoint.notes(), [note]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Whatever happens to the bytes, opening ends with tensors that lie in the file or with a message.
    #[test]
    fn mutated_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..6),
        large in any::<bool>(),
    ) {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join(NAME);
        write_zip(&path, &cases::good(), large);
        let mut bytes = fs::read(&path).unwrap();
        for (place, byte, kind) in changes {
            let place = place.index(bytes.len());
            match kind {
                0 | 1 => bytes[place] = byte,
                2 => bytes.insert(place, byte),
                _ => { bytes.remove(place); }
            }
        }
        fs::write(&path, &bytes).unwrap();
        match open_weights(temporary.path()) {
            Err(error) => prop_assert!(error.to_string().contains(NAME)),
            Ok(weights) => for (name, entry) in weights.tensors() {
                prop_assert!(entry.offset + entry.bytes <= bytes.len() as u64);
                weights.read_into(name, 0, &mut vec![0; entry.bytes as usize]).unwrap();
            },
        }
    }

    /// The same with the pickle alone, which most changes above do not reach: any bytes, and the right ones changed.
    #[test]
    fn mutated_pickles_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"\x80}()t\x85\x86\x87N\x88\x89KMJ\x8aXcqrhjsuQRb.".to_vec())), 0..8),
        wild in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let temporary = tempfile::tempdir().unwrap();
        let mut pickle = state_dict(&cases::tensors());
        for (place, opcode) in &changes {
            let place = place.index(pickle.len());
            pickle[place] = *opcode;
        }
        let at = wild.len() % pickle.len();
        pickle.splice(at..at, wild);
        write_zip(&temporary.path().join(NAME), &records(pickle, &cases::storages()), false);
        if let Err(error) = open_weights(temporary.path()) {
            prop_assert!(error.to_string().contains(NAME));
        }
    }
}
