//! Adapters of one layer, as Burn attaches them to a weight.

use std::cell::RefCell;
use std::sync::Arc;

use burn::module::{Content, Param, Reparameterization};
use burn::module::{Devices, LoraAdapter, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor};
use burn::tensor::{Device, Int, Tensor};
use lowrank_kernels::ops;
use lowrank_optim::{ModulePath, Part};

use super::any::AnyStructure;
use super::base::{Base, Below};
use super::control::Control;
use super::pass::Input;
use super::site::Place;
use super::structure::Structure;

/// One adapter on one layer.
#[derive(Module, Debug)]
pub struct Adapter {
    /// Structure of the adapter.
    pub structure: AnyStructure,
    /// Initial product of the factors, if they start as part of the weight: it is subtracted from the base, so that the
    /// output of the layer does not change at the start. The weight itself is never changed.
    pub origin: Option<LoraAdapter>,
    #[module(skip)]
    pub(crate) control: Control,
    #[module(skip)]
    pub(crate) layer: u64,
    #[module(skip)]
    pub(crate) place: Arc<Place>,
}

impl Adapter {
    /// Returns the handle that all layers of the adapter share.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Static properties of the layer, with its current rank and scale.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Returns the structure.
    pub fn structure(&self) -> &dyn Structure {
        self.structure.get()
    }

    /// Change of the weight below as two factors `[d_in, r]` and `[r, d_out]`, if it is a product: the factors of the
    /// structure combined with the initial ones, which are subtracted.
    pub fn change(&self) -> Option<[Tensor<2>; 2]> {
        let [a, b] = self.structure().as_factors()?;
        Some(match &self.origin {
            None => [a, b],
            Some(origin) => [
                Tensor::cat(vec![a, origin.a.val()], 1),
                Tensor::cat(vec![b, origin.b.val().mul_scalar(-origin.scale)], 0),
            ],
        })
    }

    /// Output `[rows, d_out]` of the layer, including the adapter if it is on.
    pub fn forward(&self, base: Base<'_>, x: Tensor<2>) -> Tensor<2> {
        if !self.control.is_on() {
            return base.forward(x);
        }
        let config = self.control.config();
        let input = Input {
            x,
            pass: self.control.pass(),
            dropout: config.dropout,
            seed: config.seed,
            layer: self.layer,
            weights: self.control.weights_of(&self.place.path),
        };
        self.structure().forward(&base.less(self.origin.as_ref()), input)
    }

    /// Weight `[d_in, d_out]` including the adapter, if the adapter has an update.
    pub fn weight(&self, base: Base<'_>) -> Tensor<2> {
        if !self.control.is_on() {
            return base.weight();
        }
        let weight = base.less(self.origin.as_ref()).weight();
        match self.structure().delta_weight(&weight) {
            Some(update) => weight + update,
            None => weight,
        }
    }

    /// Weight `[d_in, d_out]` below, recovered from the one that the adapter was merged into; none if merging is not
    /// reversible.
    pub fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        let weight = self.structure().unmerged(merged)?;
        Some(match &self.origin {
            Some(product) => weight + product.delta(),
            None => weight,
        })
    }

    /// Returns true if any tensor of the adapter is trained; adapters below the newest are frozen.
    pub fn is_trained(&self) -> bool {
        is_trained(&self.structure)
    }

    /// Bias `[d_out]` including the adapter.
    pub fn bias(&self, base: Base<'_>) -> Option<Tensor<1>> {
        if !self.control.is_on() {
            return base.bias();
        }
        let weight = base.less(self.origin.as_ref()).weight();
        self.structure().merged_bias(&weight, base.bias())
    }
}

/// The adapters of one layer, first to last; each is attached to the layer with those before it.
#[derive(Clone, Debug, Default)]
pub struct AdapterStack {
    /// Adapters, first to last.
    pub stack: Vec<Adapter>,
}

impl AdapterStack {
    /// Returns the layer of this weight and bias with all its adapters.
    pub fn over<'a>(&'a self, weight: &'a Tensor<2>, bias: Option<&'a Tensor<1>>) -> Base<'a> {
        Base::new(weight, bias).under(&self.stack, self.stack.len())
    }

    /// Output `[rows, d_out]` of a linear layer for `x [rows, d_in]`, with factored adapters if it has any: weight
    /// `[d_in, d_out]`, bias `[d_out]`. A layer that calls this can be adapted by
    /// [`Attach::factored`](crate::Attach::factored).
    pub fn linear(weight: &Param<Tensor<2>>, bias: Option<Tensor<1>>, x: Tensor<2>) -> Tensor<2> {
        match weight.reparameterization::<Self>() {
            Some(adapter) => adapter.over(&weight.base(), bias.as_ref()).forward(x),
            None => {
                // Adapters of other kinds compose the weight.
                let y = ops::linear(x, weight.val());
                match bias {
                    Some(bias) => y + bias.unsqueeze(),
                    None => y,
                }
            }
        }
    }
}

impl AdapterStack {
    /// Rows `[batch, positions, width]` of a table `[rows, width]` at `ids [batch, positions]`, with factored adapters if
    /// it has any: only the rows of the factors that are looked up.
    pub fn rows(weight: &Param<Tensor<2>>, ids: Tensor<2, Int>) -> Tensor<3> {
        let on = |stack: &Self| -> Option<Vec<[Tensor<2>; 2]>> {
            stack.stack.iter().filter(|adapter| adapter.control.is_on()).map(Adapter::change).collect()
        };
        let Some(changes) = weight.reparameterization::<Self>().and_then(on) else {
            return ops::embedding(weight.val(), ids);
        };
        let [batch, positions] = ids.dims();
        let mut rows = ops::embedding(weight.base(), ids.clone());
        for [a, b] in changes {
            let ([_, rank], [_, width]) = (a.dims(), b.dims());
            if rank > 0 {
                let inner = ops::embedding(a, ids.clone()).reshape([batch * positions, rank]);
                rows = rows + ops::linear(inner, b).reshape([batch, positions, width]);
            }
        }
        rows
    }

    /// The table alone, for a head that shares it: adapters of the table change the rows that are looked up.
    pub fn table(weight: &Param<Tensor<2>>) -> Tensor<2> {
        if weight.reparameterization::<Self>().is_some() { weight.base() } else { weight.val() }
    }
}

impl Below for Vec<Adapter> {
    fn forward(&self, count: usize, base: Base<'_>, x: Tensor<2>) -> Tensor<2> {
        self[count - 1].forward(base.under(self, count - 1), x)
    }

    fn weight(&self, count: usize, base: Base<'_>) -> Tensor<2> {
        self[count - 1].weight(base.under(self, count - 1))
    }

    fn bias(&self, count: usize, base: Base<'_>) -> Option<Tensor<1>> {
        self[count - 1].bias(base.under(self, count - 1))
    }
}

impl Reparameterization for AdapterStack {
    const NAME: &'static str = "adapter";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let shape = base.dims();
        if self.stack.iter().all(|attached| !attached.control.is_on()) || D != 2 {
            return base;
        }
        let weight = matrix(base);
        self.over(&weight, None).weight().reshape(shape)
    }
}

thread_local! {
    /// Adapters collected during a visit of [`each_adapter`]: Burn shows a visitor the tensors of a reparameterization
    /// but not the reparameterization itself.
    static SEEN: RefCell<Option<Vec<AdapterStack>>> = const { RefCell::new(None) };
}

const FIELD: (&str, &str) = ("stack", "Struct:AdapterStack");

impl Module for AdapterStack {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.stack.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self { stack: self.stack.fork(device) }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { stack: self.stack.to_device(device) }
    }

    fn train(self) -> Self {
        Self { stack: Module::train(self.stack) }
    }

    fn valid(&self) -> Self {
        Self { stack: self.stack.valid() }
    }

    fn materialize(self) -> Self {
        Self { stack: self.stack.materialize() }
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        SEEN.with_borrow_mut(|seen| {
            if let Some(seen) = seen {
                seen.push(self.clone());
            }
        });
        visitor.enter_module(FIELD.0, FIELD.1);
        self.stack.visit(visitor);
        visitor.exit_module(FIELD.0, FIELD.1);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        mapper.enter_module(FIELD.0, FIELD.1);
        let stack = self.stack.map(mapper);
        mapper.exit_module(FIELD.0, FIELD.1);
        Self { stack }
    }
}

impl ModuleDisplayDefault for AdapterStack {
    fn content(&self, content: Content) -> Option<Content> {
        content.set_top_level_type("AdapterStack").add_formatted(&self.stack.len()).optional()
    }
}

impl ModuleDisplay for AdapterStack {}

/// Returns true if any tensor of a module is trained.
pub fn is_trained<M: Module>(module: &M) -> bool {
    struct Any(bool);
    impl ModuleVisitor for Any {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 |= param.is_require_grad();
        }
    }
    let mut any = Any(false);
    module.visit(&mut any);
    any.0
}

/// Visits every adapted layer of a module, or of a part of one, with its path and adapters.
pub fn each_adapter(part: &dyn Part, mut see: impl FnMut(&str, &AdapterStack)) {
    each_adapted(part, |path, _, adapter| see(path, adapter));
}

/// Visits every adapted layer of a module, or of a part of one, with its path, the weight `[d_in, d_out]` below and its
/// adapters.
pub fn each_adapted(part: &dyn Part, see: impl FnMut(&str, &Tensor<2>, &AdapterStack)) {
    struct Walk<F> {
        path: ModulePath,
        base: Option<Tensor<2>>,
        see: F,
    }
    impl<F: FnMut(&str, &Tensor<2>, &AdapterStack)> ModuleVisitor for Walk<F> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, name: &str, container: &str) {
            self.path.exit();
            if (name, container) == (AdapterStack::NAME, "Reparameterization") {
                let base = self.base.take();
                for (adapter, base) in SEEN.replace(Some(Vec::new())).into_iter().flatten().zip(&base) {
                    (self.see)(layer_of(&self.path.joined()), base, &adapter);
                }
            }
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            // The base comes just before its adapters, whose own tensors are nested in them.
            let inside = self.path.containers().any(|container| container == FIELD.1);
            let shape = param.lazy_shape();
            if let ([_, _], false, true) = (shape.as_slice(), inside, param.is_initialized()) {
                self.base = Some(matrix(param.base()));
            }
        }
    }
    SEEN.set(Some(Vec::new()));
    part.walk(&mut Walk { path: ModulePath::default(), base: None, see });
    SEEN.set(None);
}

/// A tensor of two dimensions as a matrix. It stays the same view of its memory, where codes may lie in place of values.
pub(crate) fn matrix<const D: usize>(tensor: Tensor<D>) -> Tensor<2> {
    debug_assert_eq!(D, 2, "a matrix has two dimensions");
    Tensor::from_dispatch(tensor.into_dispatch())
}

/// Path of the layer that a parameter belongs to.
pub(crate) fn layer_of(parameter: &str) -> &str {
    parameter.strip_suffix(".weight").unwrap_or(parameter)
}
