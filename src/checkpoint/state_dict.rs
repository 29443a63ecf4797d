//! The state dict of a PyTorch file: what the few names in its pickle mean, and which tensors come of them.
use super::HeaderFault;
use super::bin_fault::BinFault;
use super::header::{MAX_RANK, MAX_TENSORS, shown};
use super::pickle::{MAX_STEPS, Machine, Span, Value};
use graphs::DType;

pub(super) const STORAGES: [(&str, DType); 8] = [
    ("FloatStorage", DType::Float32),
    ("HalfStorage", DType::Float16),
    ("BFloat16Storage", DType::Bfloat16),
    ("IntStorage", DType::Int32),
    ("LongStorage", DType::Int64),
    ("CharStorage", DType::Int8),
    ("ByteStorage", DType::Uint8),
    ("BoolStorage", DType::Bool),
];

/// One entry of the state dict. Counts and strides are in elements, as the pickle has them and unchecked but for the rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pickled<'p> {
    pub(crate) name: &'p str,
    pub(crate) dtype: DType,
    /// The storage's record, below `data/`.
    pub(crate) key: &'p str,
    /// Elements of the storage.
    pub(crate) elements: i64,
    /// The first element in the storage.
    pub(crate) first: i64,
    pub(crate) shape: Vec<i64>,
    pub(crate) stride: Vec<i64>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(DType),
}

impl Global {
    pub(super) fn find(module: &str, name: &str) -> Result<Global, BinFault> {
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
            ("torch", name) if name.ends_with("Storage") => match STORAGES.iter().find(|row| row.0 == name) {
                Some((_, dtype)) => Ok(Global::Storage(*dtype)),
                None => Err(BinFault::Storage { found: shown(name) }),
            },
            _ => Err(BinFault::Global { found: shown(&format!("{module}.{name}")) }),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Storage {
    dtype: DType,
    key: Span,
    elements: i64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Tensor {
    storage: u32,
    first: i64,
    shape: Span,
    stride: Span,
}

/// The entries of the state dict that a pickle of protocol 2 describes, in its order.
pub(crate) fn state_dict(bytes: &[u8]) -> Result<Vec<Pickled<'_>>, BinFault> {
    let mut machine = Machine::new(bytes);
    for _ in 0..MAX_STEPS {
        if let Some(top) = machine.step()? {
            return machine.finish(top);
        }
    }
    Err(BinFault::Steps { limit: MAX_STEPS })
}

impl<'p> Machine<'p> {
    fn arguments(&self, value: Value) -> Result<&[Value], BinFault> {
        match value {
            Value::Tuple(span) => Ok(span.of(&self.tuples)),
            other => Err(self.wanted(other, "a tuple")),
        }
    }

    /// A storage, which the pickle names by (`storage`, its type, its key, a device, its elements).
    pub(super) fn persistent(&mut self) -> Result<(), BinFault> {
        let name = self.pop()?;
        let storage = match self.arguments(name)? {
            &[Value::Text(word), Value::Global(Global::Storage(dtype)), Value::Text(key), _, Value::Int(elements)]
                if self.read(word) == "storage" =>
            {
                Storage { dtype, key, elements }
            }
            _ => return Err(self.wanted(name, "the five parts of a storage's name")),
        };
        self.storages.push(storage);
        self.push(Value::Storage(self.storages.len() as u32 - 1))
    }

    pub(super) fn reduce(&mut self) -> Result<(), BinFault> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = function else { return Err(self.wanted(function, "a name")) };
        match (function, self.arguments(arguments)?) {
            (Global::OrderedDict, []) => self.new_dict(),
            (
                Global::RebuildTensor,
                // Whether it wants a gradient, and its hooks; a seventh part would say that values are to be negated.
                &[Value::Storage(storage), Value::Int(first), Value::Tuple(shape), Value::Tuple(stride), _, _],
            ) => {
                self.tensors.push(Tensor { storage, first, shape, stride });
                self.push(Value::Tensor(self.tensors.len() as u32 - 1))
            }
            (Global::RebuildParameter, &[tensor @ Value::Tensor(_), _, _]) => self.push(tensor),
            (Global::OrderedDict, _) => Err(self.wanted(arguments, "no arguments of an ordered dict")),
            (Global::RebuildTensor, _) => Err(self.wanted(arguments, "the parts of a tensor")),
            (Global::RebuildParameter, _) => Err(self.wanted(arguments, "the parts of a parameter")),
            (Global::Storage(_), _) => Err(BinFault::Called { at: self.opcode }),
        }
    }

    /// Modules keep versions in an attribute of their state dict, which nothing here needs.
    pub(super) fn build(&mut self) -> Result<(), BinFault> {
        match (self.pop()?, self.top()?) {
            (Value::Dict(_), Value::Dict(_)) => Ok(()),
            (_, other) => Err(self.wanted(other, "a dict with attributes")),
        }
    }

    fn finish(self, top: Value) -> Result<Vec<Pickled<'p>>, BinFault> {
        let Value::Dict(dict) = top else { return Err(BinFault::Top { found: top.kind() }) };
        let entries = &self.dicts[dict as usize];
        if entries.len() > MAX_TENSORS {
            return Err(HeaderFault::TooMany.into());
        }
        entries.iter().map(|&(name, value)| self.entry(name, value)).collect()
    }

    fn entry(&self, name: Value, value: Value) -> Result<Pickled<'p>, BinFault> {
        let Value::Text(name) = name else { return Err(BinFault::Key { found: name.kind() }) };
        let name = self.read(name);
        let Value::Tensor(tensor) = value else {
            return Err(BinFault::Entry { entry: shown(name), found: value.kind() });
        };
        let Tensor { storage, first, shape, stride } = self.tensors[tensor as usize];
        let Storage { dtype, key, elements } = self.storages[storage as usize];
        let sizes = |span: Span| {
            let values = span.of(&self.tuples);
            if values.len() > MAX_RANK {
                return Err(HeaderFault::Rank { tensor: shown(name), found: values.len() }.into());
            }
            let size = |value: &Value| match *value {
                Value::Int(size) => Ok(size),
                other => Err(BinFault::Size { tensor: shown(name), found: other.kind() }),
            };
            values.iter().map(size).collect::<Result<Vec<i64>, BinFault>>()
        };
        let (shape, stride) = (sizes(shape)?, sizes(stride)?);
        Ok(Pickled { name, dtype, key: self.read(key), elements, first, shape, stride })
    }
}
