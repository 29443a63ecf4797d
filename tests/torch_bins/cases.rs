//! The table of wrong files and their messages.
use super::writer::*;
use std::fs;
use std::path::Path;

/// A name, what writes the file, the message.
pub(crate) type Case = (&'static str, fn(&Path), &'static str);

/// Two tensors, `a` F32 [2, 3] and `b` F16 [4].
pub(crate) fn tensors() -> Vec<Tensor> {
    vec![tensor("a", "FloatStorage", "0", &[2, 3]), tensor("b", "HalfStorage", "1", &[4])]
}

pub(crate) fn storages() -> Vec<(&'static str, Vec<u8>)> {
    vec![("0", (0..24).collect()), ("1", (100..108).collect())]
}

pub(crate) fn good() -> Vec<Record> {
    records(state_dict(&tensors()), &storages())
}

/// The good file with other records.
fn zip(path: &Path, change: impl FnOnce(&mut Vec<Record>)) {
    let mut records = good();
    change(&mut records);
    write_zip(path, &records, false);
}

/// The good file with other bytes.
fn patch(path: &Path, large: bool, change: impl FnOnce(&mut Vec<u8>)) {
    write_zip(path, &good(), large);
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// The good file with other bytes so far before its end.
fn patch_end(path: &Path, large: bool, before: usize, value: &[u8]) {
    patch(path, large, |bytes| {
        let at = bytes.len() - before;
        put(bytes, at, value)
    });
}

/// The good file with another pickle.
fn pickle(path: &Path, pickle: Vec<u8>) {
    write_zip(path, &records(pickle, &storages()), false);
}

/// The good file with another `a`.
fn first(path: &Path, change: impl FnOnce(&mut Tensor)) {
    let mut tensors = tensors();
    change(&mut tensors[0]);
    pickle(path, state_dict(&tensors));
}

/// The place of the first directory entry of a record.
fn entry(bytes: &[u8], name: &str) -> usize {
    let found = bytes.windows(name.len()).rposition(|window| window == name.as_bytes()).unwrap();
    found - 46
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

pub(crate) const CASES: &[Case] = &[
    ("empty file", |p| fs::write(p, "").unwrap(), "the file is empty"),
    (
        "git lfs pointer",
        |p| fs::write(p, "version https://git-lfs.github.com/spec/v1\n").unwrap(),
        "a Git LFS pointer was found, a PyTorch file wanted",
    ),
    (
        "web page",
        |p| fs::write(p, "<!DOCTYPE html><title>502</title>").unwrap(),
        "a web page was found, a PyTorch file wanted",
    ),
    (
        "bare pickle of PyTorch 1.5",
        |p| fs::write(p, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.").unwrap(),
        "the file is a bare pickle, as of PyTorch before 1.6, only the zip format is read",
    ),
    (
        "tar",
        |p| {
            let mut bytes = vec![0; 1024];
            put(&mut bytes, 257, b"ustar");
            fs::write(p, bytes).unwrap()
        },
        "the file is a tar, as of the first PyTorch, only the zip format is read",
    ),
    ("no zip", |p| fs::write(p, [7; 100]).unwrap(), "the file is no zip archive, as PyTorch writes them"),
    (
        "four bytes",
        |p| fs::write(p, b"PK\x03\x04").unwrap(),
        "no zip directory ends the file: it is cut, or something was added",
    ),
    (
        "cut in the middle",
        |p| patch(p, false, |bytes| bytes.truncate(bytes.len() / 2)),
        "no zip directory ends the file: it is cut, or something was added",
    ),
    (
        "cut at the end",
        |p| patch(p, true, |bytes| bytes.truncate(bytes.len() - 1)),
        "no zip directory ends the file: it is cut, or something was added",
    ),
    (
        "bytes after the end",
        |p| patch(p, false, |bytes| bytes.push(0)),
        "no zip directory ends the file: it is cut, or something was added",
    ),
    (
        "64-bit end record moved",
        |p| patch_end(p, true, 34, &77u64.to_le_bytes()),
        "the zip's 64-bit end record is not where it must be",
    ),
    ("split zip", |p| patch_end(p, false, 18, &[1]), "the zip is split over several files"),
    (
        "2^60 records",
        |p| patch_end(p, true, 74, &[1u64 << 60, 1 << 60].map(u64::to_le_bytes).concat()),
        "the zip claims 1152921504606846976 records, the limit is 200064",
    ),
    (
        "directory of 2^60 bytes",
        |p| patch_end(p, true, 58, &(1u64 << 60).to_le_bytes()),
        "the zip directory claims 1152921504606846976 bytes for 5 records",
    ),
    (
        "directory elsewhere",
        |p| patch_end(p, false, 6, &[0, 0]),
        "the zip directory claims bytes 0 and 276 more, wanted them to end at 1062",
    ),
    (
        "a record more than there is",
        |p| patch_end(p, false, 14, &[6, 0, 6, 0]),
        "the zip directory ends inside an entry",
    ),
    (
        "a record less than there is",
        |p| patch_end(p, false, 14, &[4, 0, 4, 0]),
        "the zip directory has 55 bytes that belong to no entry",
    ),
    (
        "record name is empty",
        |p| zip(p, |records| records[4].name.clear()),
        "a record is named ``, wanted a short name in UTF-8",
    ),
    ("record twice", |p| zip(p, |records| records[4].name = "m/data/1".into()), "record `m/data/1` appears twice"),
    ("encrypted record", |p| zip(p, |records| records[2].flags |= 1), "record `m/data/0` is encrypted"),
    (
        "compressed record",
        |p| zip(p, |records| records[2].method = 8),
        "record `m/data/0` is compressed (method 8), only stored ones are read",
    ),
    (
        "stored smaller than it is",
        |p| zip(p, |records| records[2].claimed = Some([12, 24])),
        "record `m/data/0` is stored in 12 bytes and claims to be 24",
    ),
    (
        "record past the directory",
        |p| zip(p, |records| records[4].claimed = Some([4000; 2])),
        "record `m/version` claims byte 664 and 4000 more, the records end at 786",
    ),
    (
        "record into the next",
        |p| zip(p, |records| records[2].claimed = Some([60; 2])),
        "record `m/data/1` overlaps `m/data/0`",
    ),
    (
        "record of 2^64 bytes",
        |p| zip(p, |records| records[2].claimed = Some([u64::MAX; 2])),
        "record `m/data/0` claims byte 470 and 18446744073709551615 more, the records end at 786",
    ),
    (
        "no 64-bit size",
        |p| {
            patch(p, false, |bytes| {
                let at = entry(bytes, "m/data/0") + 24;
                put(bytes, at, &u32::MAX.to_le_bytes())
            })
        },
        "record `m/data/0` lacks its 64-bit sizes",
    ),
    (
        "local header elsewhere",
        |p| {
            patch(p, false, |bytes| {
                let at = entry(bytes, "m/version") + 42;
                bytes[at] += 1
            })
        },
        "record `m/version` does not begin at byte 665, where the zip directory places it",
    ),
    (
        "local header of another record",
        |p| patch(p, false, |bytes| put(bytes, 30, b"n/data.pkl")),
        "record `m/data.pkl` does not begin at byte 0, where the zip directory places it",
    ),
    ("no data.pkl", |p| zip(p, |records| drop(records.remove(0))), "record `data.pkl` is missing"),
    (
        "two state dicts",
        |p| zip(p, |records| records[1].name = "n/data.pkl".into()),
        "the file holds 2 records `data.pkl`, wanted one",
    ),
    (
        "TorchScript",
        |p| zip(p, |records| records[4].name = "m/constants.pkl".into()),
        "the file is a TorchScript program, a state dict is wanted",
    ),
    (
        "big-endian",
        |p| zip(p, |records| records[1].data = b"big".to_vec()),
        "the file was written on a machine of byte order `big`, only `little` is read",
    ),
    (
        "huge pickle",
        |p| zip(p, |records| records[0].hole = 1 << 30),
        "record `data.pkl` has 1073742095 bytes, the limit is 33554432",
    ),
    ("no pickle", |p| pickle(p, b"{}".to_vec()), "`data.pkl` does not begin as a pickle"),
    ("empty pickle", |p| pickle(p, Vec::new()), "`data.pkl` ends inside the opcode at byte 0"),
    ("pickle protocol 4", |p| pickle(p, b"\x80\x04}.".to_vec()), "`data.pkl` is of pickle protocol 4, wanted 2"),
    (
        "os.system",
        |p| pickle(p, [b"\x80\x02cos\nsystem\n(".to_vec(), text("id"), b"tR.".to_vec()].concat()),
        "`data.pkl` asks for `os.system`, which no state dict needs and which is never run",
    ),
    (
        "eval, under a tensor's name",
        |p| pickle(p, dict(&[text("a"), b"cbuiltins\neval\n".to_vec()].concat())),
        "`data.pkl` asks for `builtins.eval`, which no state dict needs and which is never run",
    ),
    (
        "a name of torch",
        |p| pickle(p, dict(&[text("a"), b"ctorch.hub\nload\n".to_vec()].concat())),
        "`data.pkl` asks for `torch.hub.load`, which no state dict needs and which is never run",
    ),
    (
        "a name with a dot",
        |p| pickle(p, b"\x80\x02ctorch\nhub.loadStorage\n.".to_vec()),
        "`data.pkl` asks for `torch.hub.loadStorage`, wanted one of FloatStorage, HalfStorage, BFloat16Storage, IntStorage, LongStorage, CharStorage, ByteStorage, BoolStorage",
    ),
    (
        "STACK_GLOBAL",
        |p| pickle(p, [b"\x80\x02".to_vec(), text("os"), text("system"), b"\x93.".to_vec()].concat()),
        "`data.pkl` has opcode 0x93 at byte 20, which no state dict needs and which is never run",
    ),
    (
        "INST",
        |p| pickle(p, b"\x80\x02(ios\nsystem\n.".to_vec()),
        "`data.pkl` has opcode 0x69 at byte 3, which no state dict needs and which is never run",
    ),
    (
        "NEWOBJ",
        |p| pickle(p, b"\x80\x02ccollections\nOrderedDict\n)\x81.".to_vec()),
        "`data.pkl` has opcode 0x81 at byte 28, which no state dict needs and which is never run",
    ),
    (
        "EXT1",
        |p| pickle(p, b"\x80\x02\x82\x01.".to_vec()),
        "`data.pkl` has opcode 0x82 at byte 2, which no state dict needs and which is never run",
    ),
    (
        "a storage is called",
        |p| pickle(p, b"\x80\x02ctorch\nFloatStorage\n)R.".to_vec()),
        "`data.pkl` calls a storage type at byte 23, which no state dict does",
    ),
    (
        "an ordered dict with arguments",
        |p| pickle(p, b"\x80\x02ccollections\nOrderedDict\n}\x85R.".to_vec()),
        "`data.pkl` has a tuple at byte 29, wanted no arguments of an ordered dict",
    ),
    ("pickle cut", |p| pickle(p, b"\x80\x02}(X\x05\0\0\0ab".to_vec()), "`data.pkl` ends inside the opcode at byte 4"),
    ("pickle without an end", |p| pickle(p, b"\x80\x02}".to_vec()), "`data.pkl` ends inside the opcode at byte 3"),
    ("name without an end", |p| pickle(p, b"\x80\x02ctorch".to_vec()), "`data.pkl` ends inside the opcode at byte 2"),
    (
        "text of 4 GiB",
        |p| pickle(p, b"\x80\x02}(X\xff\xff\xff\xffab".to_vec()),
        "`data.pkl` ends inside the opcode at byte 4",
    ),
    (
        "number of 200 bytes",
        |p| pickle(p, [b"\x80\x02\x8a\xc8".to_vec(), vec![1; 200]].concat()),
        "`data.pkl` has a number of 200 bytes at byte 2, at most 8 are read",
    ),
    (
        "memory place 2^32 - 1",
        |p| pickle(p, b"\x80\x02}r\xff\xff\xff\xff.".to_vec()),
        "`data.pkl` names place 4294967295 of its memory at byte 3, 0 are filled",
    ),
    (
        "memory place not filled",
        |p| pickle(p, b"\x80\x02h\x03.".to_vec()),
        "`data.pkl` names place 3 of its memory at byte 2, 0 are filled",
    ),
    (
        "stack too short",
        |p| pickle(p, b"\x80\x02}t.".to_vec()),
        "`data.pkl` takes a value at byte 3 where there is none",
    ),
    (
        "an item without a value",
        |p| pickle(p, dict(&text("a"))),
        "`data.pkl` takes a value at byte 10 where there is none",
    ),
    (
        "a million values",
        |p| pickle(p, [b"\x80\x02".to_vec(), vec![b'N'; 1_000_000]].concat()),
        "`data.pkl` holds more than 65536 values at once",
    ),
    (
        "tuples, four million deep",
        |p| pickle(p, [b"\x80\x02N".to_vec(), vec![0x85; 5_000_000]].concat()),
        "`data.pkl` has more than 4194304 opcodes",
    ),
    (
        "something after the end",
        |p| pickle(p, b"\x80\x02}.}".to_vec()),
        "`data.pkl` ends with 1 bytes and 0 values left over",
    ),
    ("two results", |p| pickle(p, b"\x80\x02}}.".to_vec()), "`data.pkl` ends with 0 bytes and 1 values left over"),
    (
        "text is not UTF-8",
        |p| pickle(p, b"\x80\x02}(X\x02\0\0\0\xff\xfeK\x01u.".to_vec()),
        "`data.pkl` has a text at byte 4 that is not UTF-8",
    ),
    (
        "attributes of a number",
        |p| pickle(p, b"\x80\x02K\x01}b.".to_vec()),
        "`data.pkl` has a number at byte 5, wanted a dict with attributes",
    ),
    (
        "a list of tensors",
        |p| pickle(p, b"\x80\x02K\x01K\x02\x86.".to_vec()),
        "`data.pkl` holds a tuple, wanted a dict of tensors",
    ),
    (
        "an epoch beside the tensors",
        |p| pickle(p, dict(&[text("epoch"), int(3)].concat())),
        "the state dict holds a number under `epoch`, wanted a tensor",
    ),
    (
        "a key that is a number",
        |p| pickle(p, dict(&[int(3), value(&tensors()[0])].concat())),
        "the state dict has a number as a key, wanted a name",
    ),
    ("no tensors", |p| pickle(p, dict(b"")), "the file holds no tensors"),
    (
        "a storage with four parts",
        |p| pickle(p, [b"\x80\x02(".to_vec(), text("storage"), b"tQ.".to_vec()].concat()),
        "`data.pkl` has a tuple at byte 16, wanted the five parts of a storage's name",
    ),
    (
        "a negated tensor",
        |p| {
            let mut bytes = value(&tensors()[0]);
            bytes.truncate(bytes.len() - 2);
            bytes.extend(b"}tR");
            pickle(p, dict(&[text("a"), bytes].concat()))
        },
        "`data.pkl` has a tuple at byte 139, wanted the parts of a tensor",
    ),
    (
        "float64",
        |p| first(p, |a| a.storage = "DoubleStorage"),
        "`data.pkl` asks for `torch.DoubleStorage`, wanted one of FloatStorage, HalfStorage, BFloat16Storage, IntStorage, LongStorage, CharStorage, ByteStorage, BoolStorage",
    ),
    (
        "a size that is no number",
        |p| {
            let bytes = state_dict(&tensors()[..1]);
            let at = bytes.windows(6).position(|window| window == b"(K\x02K\x03t").unwrap();
            pickle(p, [&bytes[..at], b"(NK\x03t", &bytes[at + 6..]].concat())
        },
        "tensor `a` has None as a size or a stride, wanted a number",
    ),
    (
        "negative size",
        |p| first(p, |a| a.shape[0] = -2),
        "tensor `a` has a negative size, stride or place: shape [-2, 3], strides [3, 1], place 0",
    ),
    (
        "negative stride",
        |p| first(p, |a| a.stride = vec![-3, 1]),
        "tensor `a` has a negative size, stride or place: shape [2, 3], strides [-3, 1], place 0",
    ),
    (
        "negative place",
        |p| first(p, |a| a.first = -1),
        "tensor `a` has a negative size, stride or place: shape [2, 3], strides [3, 1], place -1",
    ),
    (
        "fewer strides than sizes",
        |p| first(p, |a| a.stride = vec![1]),
        "tensor `a` of shape [2, 3] has strides [1], wanted the contiguous [3, 1]",
    ),
    (
        "transposed",
        |p| first(p, |a| a.stride = vec![1, 2]),
        "tensor `a` of shape [2, 3] has strides [1, 2], wanted the contiguous [3, 1]",
    ),
    (
        "rows that overlap",
        |p| first(p, |a| a.stride = vec![0, 1]),
        "tensor `a` of shape [2, 3] has strides [0, 1], wanted the contiguous [3, 1]",
    ),
    (
        "rank 9",
        |p| first(p, |a| (a.shape, a.stride) = (vec![1; 9], vec![1; 9])),
        "tensor `a` has 9 dimensions, at most 8 are read",
    ),
    ("no elements", |p| first(p, |a| a.shape[1] = 0), "tensor `a` of shape [2, 0] has no elements"),
    (
        "size overflows",
        |p| first(p, |a| a.shape = vec![1 << 40, 1 << 40]),
        "tensor `a` of shape [1099511627776, 1099511627776] is larger than can be counted",
    ),
    ("past the storage", |p| first(p, |a| a.first = 1), "tensor `a` reaches element 7 of its storage, which has 6"),
    (
        "place overflows",
        |p| first(p, |a| a.first = i64::MAX),
        "tensor `a` of shape [2, 3] is larger than can be counted",
    ),
    (
        "larger than the storage",
        |p| first(p, |a| (a.shape, a.stride) = (vec![7], vec![1])),
        "tensor `a` reaches element 7 of its storage, which has 6",
    ),
    (
        "storage larger than its record",
        |p| first(p, |a| a.elements = 7),
        "record `data/0` of tensor `a` has 24 bytes, wanted 7 x float32",
    ),
    (
        "storage of -1 elements",
        |p| first(p, |a| a.elements = -1),
        "record `data/0` of tensor `a` has 24 bytes, wanted -1 x float32",
    ),
    (
        "no such record",
        |p| first(p, |a| a.key = "../0".into()),
        "tensor `a` lies in record `data/../0`, which is missing",
    ),
    (
        "one storage of two types",
        |p| {
            let mut tensors = tensors();
            tensors[1].key = "0".into();
            pickle(p, state_dict(&tensors))
        },
        "record `data/0` of tensor `b` is 4 x float16 here and 6 x float32 before",
    ),
    (
        "tensor twice",
        |p| pickle(p, state_dict(&[&tensors()[..], &tensors()[..1]].concat())),
        "tensor `a` appears twice in the state dict",
    ),
    (
        "path as a name",
        |p| first(p, |a| a.name = "../../etc/passwd".into()),
        "a tensor is named `../../etc/passwd`, which looks like a path",
    ),
    (
        "control name",
        |p| first(p, |a| a.name = "a\u{1b}[2J".into()),
        "a tensor is named `a\\u{1b}[2J`, which holds control characters",
    ),
];
