//! Named tensors of an adapter, in the layout of files and papers.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_optim::ModulePath;

use super::site::SharedBytes;
use super::spec::TensorRole;
use super::stack::Adapter;
use lowrank_kernels::host::values as host;

/// Tensor of an adapter.
#[derive(Clone, Debug)]
pub struct NamedTensor {
    /// Field of the structure; `origin.a` and `origin.b` for the initial product of the factors.
    pub field: String,
    /// Role of the tensor.
    pub role: TensorRole,
    /// True if files hold it transposed.
    pub transposed: bool,
    /// Parameter id.
    pub id: ParamId,
    /// Shape in memory.
    pub shape: Vec<usize>,
}

impl Adapter {
    /// Names and shapes of the tensors.
    pub fn shapes(&self) -> Vec<NamedTensor> {
        let mut names = Names { attached: self, path: ModulePath::default(), origin: false, found: Vec::new() };
        self.structure.visit(&mut names);
        names.origin = true;
        self.origin.visit(&mut names);
        names.found
    }

    /// Tensors with their values, in the layout of files.
    pub fn tensors(&self) -> Vec<(NamedTensor, TensorData)> {
        self.shapes()
            .into_iter()
            .map(|tensor| {
                let mut value = Value { id: tensor.id, transposed: tensor.transposed, data: None };
                self.visit(&mut value);
                match value.data {
                    Some(data) => (tensor, data),
                    None => unreachable!("every tensor that was named has a value"),
                }
            })
            .collect()
    }
}

impl SharedBytes {
    /// Values of the shared tensor, in the layout of files.
    pub fn tensor(&self) -> TensorData {
        let (shape, transposed) = &self.layout;
        let data = TensorData::new(host(self.values.clone()), shape.clone());
        match transposed {
            true => Tensor::<2>::from_data(data, &Device::default()).transpose().into_data(),
            false => data,
        }
    }
}

struct Names<'a> {
    attached: &'a Adapter,
    path: ModulePath,
    origin: bool,
    found: Vec<NamedTensor>,
}

impl ModuleVisitor for Names<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let field = self.path.joined();
        let shape = param.lazy_shape().as_slice().to_vec();
        let (field, role, transposed) = match self.origin {
            true => (format!("origin.{field}"), TensorRole::Frozen, true),
            false => match self.attached.structure.spec().tensor(&field) {
                Some(tensor) => (field, tensor.role, tensor.transposed && D == 2),
                None => unreachable!("a structure names its tensors: {field}"),
            },
        };
        self.found.push(NamedTensor { field, role, transposed, id: param.id, shape });
    }
}

struct Value {
    id: ParamId,
    transposed: bool,
    data: Option<TensorData>,
}

impl ModuleVisitor for Value {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.id == self.id {
            let tensor = param.val().without_autodiff();
            let tensor = if self.transposed { tensor.transpose() } else { tensor };
            self.data = Some(tensor.into_data());
        }
    }
}
