//! The table of damages and their messages.
use super::{NORM, shard, split, write, write_index};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// A name, the damage done to a copy of llava-hf, the message.
pub(crate) type Case = (&'static str, fn(&Path), &'static str);

/// A header of one tensor of eight bytes.
const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

pub(crate) const CASES: &[Case] = &[
    ("no config", |d| fs::remove_file(d.join("config.json")).unwrap(), "`DIR/config.json` is missing"),
    (
        "config is a folder",
        |d| {
            fs::remove_file(d.join("config.json")).unwrap();
            fs::create_dir(d.join("config.json")).unwrap()
        },
        "`DIR/config.json` is not a regular file",
    ),
    (
        "config is cut",
        |d| fs::write(d.join("config.json"), "{\"model_type\": \"llava\",").unwrap(),
        "`DIR/config.json` is not valid JSON: EOF while parsing a value at line 1 column 23",
    ),
    (
        "config is a list",
        |d| fs::write(d.join("config.json"), "[1]").unwrap(),
        "`DIR/config.json` holds an array, wanted an object",
    ),
    (
        "config key twice",
        |d| fs::write(d.join("config.json"), "{\"a\":1,\n\"b\":{\"c\":1,\"c\":2}}").unwrap(),
        "`DIR/config.json` is not valid JSON: key `c` appears twice at line 2 column 14",
    ),
    (
        "config is not UTF-8",
        |d| fs::write(d.join("config.json"), b"{\"a\":\"\xff\"}").unwrap(),
        "`DIR/config.json` is not valid JSON: invalid unicode code point at line 1 column 7",
    ),
    (
        "no weights",
        |d| fs::remove_file(d.join("model.safetensors")).unwrap(),
        "`DIR` holds no weights: found neither `model.safetensors` nor `pytorch_model.bin` nor an index of either",
    ),
    (
        "PyTorch shards, no index",
        |d| {
            fs::remove_file(d.join("model.safetensors")).unwrap();
            fs::write(d.join("training_args.bin"), "x").unwrap();
            for number in 1..3 {
                fs::write(d.join(format!("pytorch_model-0000{number}-of-00002.bin")), "x").unwrap()
            }
        },
        "`DIR` holds 2 `.bin` files and no index: `pytorch_model-00001-of-00002.bin`, `pytorch_model-00002-of-00002.bin`",
    ),
    (
        "two files, no index",
        |d| {
            shard(d);
            fs::remove_file(d.join("model.safetensors.index.json")).unwrap()
        },
        "`DIR` holds 2 safetensors files and no index: `model-00001-of-00002.safetensors`, `model-00002-of-00002.safetensors`",
    ),
    (
        "empty file",
        |d| fs::write(d.join("model.safetensors"), "").unwrap(),
        "`DIR/model.safetensors`: the file is empty",
    ),
    (
        "five bytes",
        |d| fs::write(d.join("model.safetensors"), "12345").unwrap(),
        "`DIR/model.safetensors`: the file ends inside its header: 5 bytes found, 8 wanted",
    ),
    (
        "huge header",
        |d| fs::write(d.join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap(),
        "`DIR/model.safetensors`: the header claims 18446744073709551615 bytes, the limit is 100000000",
    ),
    (
        "header cut",
        |d| fs::write(d.join("model.safetensors"), b"\x64\0\0\0\0\0\0\0{}").unwrap(),
        "`DIR/model.safetensors`: the file ends inside its header: 10 bytes found, 108 wanted",
    ),
    (
        "git lfs pointer",
        |d| fs::write(d.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n").unwrap(),
        "`DIR/model.safetensors`: a Git LFS pointer was found, a safetensors file wanted",
    ),
    (
        "web page",
        |d| fs::write(d.join("model.safetensors"), "<!DOCTYPE html><title>502</title>").unwrap(),
        "`DIR/model.safetensors`: a web page was found, a safetensors file wanted",
    ),
    ("header is a list", |d| header(d, "[]", 0), "`DIR/model.safetensors`: the header does not begin with `{`"),
    ("header is blank", |d| header(d, "", 8), "`DIR/model.safetensors`: the header does not begin with `{`"),
    (
        "header is not JSON",
        |d| header(d, "{\"a\":}", 0),
        "`DIR/model.safetensors`: the header entry of tensor `a` is malformed: expected value at line 1 column 6",
    ),
    (
        "two JSON values",
        |d| header(d, "{}{}", 0),
        "`DIR/model.safetensors`: the header is not valid JSON: trailing characters at line 1 column 3",
    ),
    (
        "no tensors",
        |d| header(d, "{\"__metadata__\":{\"format\":\"pt\"}}", 0),
        "`DIR/model.safetensors`: the file holds no tensors",
    ),
    (
        "metadata number",
        |d| header(d, "{\"__metadata__\":{\"step\":3}}", 0),
        "`DIR/model.safetensors`: `__metadata__` holds a number under `step`, only strings are allowed",
    ),
    (
        "data cut",
        |d| {
            let path = d.join("model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(path, &bytes[..300_000]).unwrap()
        },
        "`DIR/model.safetensors`: the file is cut: 300000 bytes found, 506208 wanted; `language_model.model.layers.1.mlp.gate_proj.weight` is the first tensor it cuts",
    ),
    (
        "data left over",
        |d| {
            let path = d.join("model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(path, [&bytes[..], &[0; 3]].concat()).unwrap()
        },
        "`DIR/model.safetensors`: the file has bytes that belong to no tensor: 506211 bytes found, 506208 wanted",
    ),
    (
        "unknown dtype",
        |d| edit(d, NORM, "dtype", json!("F8_E4M3")),
        "`DIR/model.safetensors`: tensor `language_model.model.norm.weight` has dtype `F8_E4M3`, wanted one of F32, F16, BF16, I32, I64, I8, U8, BOOL",
    ),
    (
        "dtype of a config",
        |d| edit(d, NORM, "dtype", json!("float32")),
        "`DIR/model.safetensors`: tensor `language_model.model.norm.weight` has dtype `float32`, wanted one of F32, F16, BF16, I32, I64, I8, U8, BOOL",
    ),
    (
        "dtype is a number",
        |d| edit(d, NORM, "dtype", json!(32)),
        "`DIR/model.safetensors`: the header entry of tensor `language_model.model.norm.weight` is malformed: invalid type: integer `32`, expected a string at line 1 column 2396",
    ),
    (
        "negative size",
        |d| edit(d, NORM, "shape", json!([-48])),
        "`DIR/model.safetensors`: the header entry of tensor `language_model.model.norm.weight` is malformed: invalid value: integer `-48`, expected u64 at line 1 column 2412",
    ),
    (
        "rank 9",
        |d| edit(d, NORM, "shape", json!([1, 1, 1, 1, 1, 1, 1, 1, 48])),
        "`DIR/model.safetensors`: tensor `language_model.model.norm.weight` has 9 dimensions, at most 8 are read",
    ),
    (
        "no elements",
        |d| edit(d, NORM, "shape", json!([48, 0])),
        "`DIR/model.safetensors`: tensor `language_model.model.norm.weight` of shape [48, 0] has no elements",
    ),
    (
        "wrong size",
        |d| edit(d, NORM, "shape", json!([49])),
        "`DIR/model.safetensors`: tensor `language_model.model.norm.weight` (F32 [49]) has 192 bytes of data, wanted 196",
    ),
    (
        "size overflows",
        |d| edit(d, NORM, "shape", json!([4294967296u64, 4294967296u64])),
        "`DIR/model.safetensors`: tensor `language_model.model.norm.weight` of shape [4294967296, 4294967296] is larger than can be counted",
    ),
    (
        "backwards",
        |d| header(d, r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
        "`DIR/model.safetensors`: tensor `a` has data offsets [8, 0], which run backwards",
    ),
    (
        "offset overflows",
        |d| {
            header(
                d,
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551607,18446744073709551615]}}"#,
                8,
            )
        },
        "`DIR/model.safetensors`: tensor `a` of shape [2] is larger than can be counted",
    ),
    (
        "three offsets",
        |d| edit(d, NORM, "data_offsets", json!([0, 192, 3])),
        "`DIR/model.safetensors`: the header entry of tensor `language_model.model.norm.weight` is malformed: trailing characters at line 1 column 2436",
    ),
    (
        "overlap",
        |d| {
            header(
                d,
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            )
        },
        "`DIR/model.safetensors`: tensor `b` overlaps `a`: its data begins at 4, wanted 8",
    ),
    (
        "gap",
        |d| {
            header(
                d,
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}"#,
                16,
            )
        },
        "`DIR/model.safetensors`: there is a gap before tensor `b`: its data begins at 12, wanted 8",
    ),
    (
        "gap at the start",
        |d| header(d, r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16),
        "`DIR/model.safetensors`: there is a gap before tensor `a`: its data begins at 8, wanted 0",
    ),
    (
        "tensor twice",
        |d| header(d, &format!("{},{}", &ONE[..ONE.len() - 1], &ONE[1..]), 8),
        "`DIR/model.safetensors`: tensor `a` appears twice in the header",
    ),
    (
        "metadata twice",
        |d| header(d, r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
        "`DIR/model.safetensors`: tensor `__metadata__` appears twice in the header",
    ),
    (
        "path as a name",
        |d| header(d, &ONE.replace("\"a\"", "\"../../etc/passwd\""), 8),
        "`DIR/model.safetensors`: a tensor is named `../../etc/passwd`, which looks like a path",
    ),
    (
        "empty name",
        |d| header(d, &ONE.replace("\"a\"", "\"\""), 8),
        "`DIR/model.safetensors`: a tensor is named ``, which is empty",
    ),
    (
        "long name",
        |d| header(d, &ONE.replace("\"a\"", &format!("{:?}", "n".repeat(1025))), 8),
        "`DIR/model.safetensors`: a tensor is named `nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn…`, which is longer than 1024 bytes",
    ),
    (
        "control name",
        |d| header(d, &ONE.replace("\"a\"", "\"a\\u001b[2J\""), 8),
        "`DIR/model.safetensors`: a tensor is named `a\\u{1b}[2J`, which holds control characters",
    ),
    (
        "index is not JSON",
        |d| {
            shard(d);
            fs::write(d.join("model.safetensors.index.json"), "nope").unwrap()
        },
        "`DIR/model.safetensors.index.json` is not valid JSON: expected ident at line 1 column 2",
    ),
    (
        "no weight_map",
        |d| {
            shard(d);
            write_index(d, &json!({"metadata": {}}))
        },
        "`DIR/model.safetensors.index.json`: `weight_map` is missing",
    ),
    (
        "weight_map is empty",
        |d| {
            shard(d);
            write_index(d, &json!({"weight_map": {}}))
        },
        "`DIR/model.safetensors.index.json`: `weight_map` is empty",
    ),
    (
        "weight_map is a list",
        |d| {
            shard(d);
            write_index(d, &json!({"weight_map": []}))
        },
        "`DIR/model.safetensors.index.json`: `weight_map` is an array, wanted an object",
    ),
    (
        "shard is a number",
        |d| {
            let mut index = shard(d);
            index["weight_map"][NORM] = json!(2);
            write_index(d, &index)
        },
        "`DIR/model.safetensors.index.json`: the shard of `language_model.model.norm.weight` is a number, wanted a file name",
    ),
    (
        "shard is a path",
        |d| {
            let mut index = shard(d);
            index["weight_map"][NORM] = json!("../model.safetensors");
            write_index(d, &index)
        },
        "`DIR/model.safetensors.index.json`: the shard of `language_model.model.norm.weight` is named `../model.safetensors`, which is not a plain file name",
    ),
    (
        "shard missing",
        |d| {
            shard(d);
            fs::remove_file(d.join("model-00002-of-00002.safetensors")).unwrap()
        },
        "`DIR/model.safetensors.index.json` names shards that are missing: `model-00002-of-00002.safetensors`",
    ),
    (
        "tensor not in shard",
        |d| {
            let mut index = shard(d);
            index["weight_map"]["extra.weight"] = json!("model-00001-of-00002.safetensors");
            write_index(d, &index)
        },
        "`DIR/model.safetensors.index.json` places tensor `extra.weight` in `model-00001-of-00002.safetensors`, which does not hold it",
    ),
    (
        "tensor not in index",
        |d| {
            let mut index = shard(d);
            index["weight_map"].as_object_mut().unwrap().remove(NORM);
            write_index(d, &index)
        },
        "`DIR/model-00001-of-00002.safetensors` holds tensor `language_model.model.norm.weight`, which the index does not list",
    ),
    (
        "tensor in two shards",
        |d| {
            shard(d);
            header_of_both(d)
        },
        "`DIR/model-00002-of-00002.safetensors` holds tensor `language_model.lm_head.weight`, which the index places in `model-00001-of-00002.safetensors`",
    ),
    (
        "link leaves the folder",
        |d| {
            fs::remove_file(d.join("config.json")).unwrap();
            symlink("/etc/hostname", d.join("config.json")).unwrap()
        },
        "`DIR/config.json` leads to `/etc/hostname`, outside of `DIR`",
    ),
    (
        "dangling link",
        |d| {
            fs::remove_file(d.join("model.safetensors")).unwrap();
            symlink("../blobs/0", d.join("model.safetensors")).unwrap()
        },
        "`DIR/model.safetensors` is a link to `../blobs/0`, which does not exist",
    ),
];

/// Puts one tensor of the first shard into the second one too.
fn header_of_both(folder: &Path) {
    let (first, _) = split(&folder.join("model-00001-of-00002.safetensors"));
    let path = folder.join("model-00002-of-00002.safetensors");
    let (mut header, mut data) = split(&path);
    let name = first.as_object().unwrap().keys().next().unwrap().clone();
    header[&name] = json!({"dtype": "U8", "shape": [1], "data_offsets": [data.len(), data.len() + 1]});
    data.push(0);
    write(&path, &header.to_string(), &data);
}

/// Changes the header entry of one tensor.
fn edit(folder: &Path, tensor: &str, key: &str, value: Value) {
    let path = folder.join("model.safetensors");
    let (mut header, data) = split(&path);
    header[tensor][key] = value;
    write(&path, &header.to_string(), &data);
}

/// A header in place of the model's, with as many bytes of data.
fn header(folder: &Path, text: &str, data: usize) {
    write(&folder.join("model.safetensors"), text, &vec![0; data]);
}
