//! A type-erased structure, so that other crates can register their own: Burn's modules are generic over their
//! visitors, and trait objects cannot be.
//!
//! Visitors cross the boundary as a [`Part`]; for mappers, parameters carry their number of dimensions, as in Burn's
//! own `reparameterization_dyn.rs`.

use std::any::Any;

use burn::module::{
    Content, Devices, Flag, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
};
use burn::tensor::{Bool, Device, Int, Tensor};
use lowrank_optim::Part;

use super::spec::Spec;
use super::structure::{Method, Structure};

/// Any structure, of this crate or registered by another one.
#[derive(Debug)]
pub struct AnyStructure(Box<dyn Erased>);

impl AnyStructure {
    /// Wraps a structure of a known type.
    pub fn new<T: Method + 'static>(structure: T) -> Self {
        Self(Box::new(structure))
    }

    /// Returns the structure by its interface.
    pub fn get(&self) -> &dyn Structure {
        &*self.0
    }

    /// Static description of the structure: name, paper, options and tensors.
    pub fn spec(&self) -> &'static Spec {
        self.0.spec()
    }

    /// Returns the structure as its concrete type; none if it has another type.
    pub fn downcast_ref<T: Method + 'static>(&self) -> Option<&T> {
        let any: &dyn Any = &*self.0;
        any.downcast_ref()
    }
}

/// A structure and its module, without generics.
trait Erased: Structure + Part + Any {
    fn spec(&self) -> &'static Spec;
    fn cloned(&self) -> Box<dyn Erased>;
    fn devices(&self, devices: Devices) -> Devices;
    fn forked(self: Box<Self>, device: &Device) -> Box<dyn Erased>;
    fn moved(self: Box<Self>, device: &Device) -> Box<dyn Erased>;
    fn trained(self: Box<Self>) -> Box<dyn Erased>;
    fn validated(&self) -> Box<dyn Erased>;
    fn materialized(self: Box<Self>) -> Box<dyn Erased>;
    fn change(self: Box<Self>, mapper: &mut dyn ErasedMapper) -> Box<dyn Erased>;
}

impl<T: Method + 'static> Erased for T {
    fn spec(&self) -> &'static Spec {
        const { &T::SPEC }
    }

    fn cloned(&self) -> Box<dyn Erased> {
        Box::new(self.clone())
    }

    fn devices(&self, devices: Devices) -> Devices {
        self.collect_devices(devices)
    }

    fn forked(self: Box<Self>, device: &Device) -> Box<dyn Erased> {
        Box::new((*self).fork(device))
    }

    fn moved(self: Box<Self>, device: &Device) -> Box<dyn Erased> {
        Box::new((*self).to_device(device))
    }

    fn trained(self: Box<Self>) -> Box<dyn Erased> {
        Box::new(Module::train(*self))
    }

    fn validated(&self) -> Box<dyn Erased> {
        Box::new(self.valid())
    }

    fn materialized(self: Box<Self>) -> Box<dyn Erased> {
        Box::new((*self).materialize())
    }

    fn change(self: Box<Self>, mapper: &mut dyn ErasedMapper) -> Box<dyn Erased> {
        Box::new((*self).map(&mut ToErased(mapper)))
    }
}

impl Clone for AnyStructure {
    fn clone(&self) -> Self {
        Self(self.0.cloned())
    }
}

impl Module for AnyStructure {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.0.devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self(self.0.forked(device))
    }

    fn to_device(self, device: &Device) -> Self {
        Self(self.0.moved(device))
    }

    fn train(self) -> Self {
        Self(self.0.trained())
    }

    fn valid(&self) -> Self {
        Self(self.0.validated())
    }

    fn materialize(self) -> Self {
        Self(self.0.materialized())
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let part: &dyn Part = &*self.0;
        part.walk(visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Self(self.0.change(&mut OfErased(mapper)))
    }
}

impl ModuleDisplayDefault for AnyStructure {
    fn content(&self, content: Content) -> Option<Content> {
        content.set_top_level_type(self.spec().name).optional()
    }
}

impl ModuleDisplay for AnyStructure {}

/// A mapper without generics: `Param<Tensor<D>>` goes in and out as a box, with `D`.
trait ErasedMapper {
    fn float(&mut self, dimensions: usize, param: Box<dyn Any>) -> Box<dyn Any>;
    fn int(&mut self, dimensions: usize, param: Box<dyn Any>) -> Box<dyn Any>;
    fn bool(&mut self, dimensions: usize, param: Box<dyn Any>) -> Box<dyn Any>;
    fn flag(&mut self, flag: Param<Flag>) -> Param<Flag>;
    fn enter(&mut self, name: &str, container: &str);
    fn exit(&mut self, name: &str, container: &str);
}

/// Sends the parameters of a structure across the boundary.
struct ToErased<'a>(&'a mut dyn ErasedMapper);

/// Receives them on the other side.
struct OfErased<'a, M>(&'a mut M);

impl ModuleMapper for ToErased<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        owned(self.0.float(D, Box::new(param)))
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        owned(self.0.int(D, Box::new(param)))
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        owned(self.0.bool(D, Box::new(param)))
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        self.0.flag(flag)
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.0.enter(name, container);
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.0.exit(name, container);
    }
}

/// Runs code for a number of dimensions that is known only at run time.
macro_rules! for_dimensions {
    ($dimensions:expr, $d:ident => $code:expr, [$($number:literal)*]) => {
        match $dimensions {
            $($number => {
                const $d: usize = $number;
                $code
            })*
            more => unreachable!("Burn's modules have tensors of 0 to 8 dimensions, not {more}"),
        }
    };
}

fn owned<T: Any>(param: Box<dyn Any>) -> T {
    match param.downcast() {
        Ok(param) => *param,
        Err(_) => unreachable!("a parameter comes with its own number of dimensions"),
    }
}

impl<M: ModuleMapper> ErasedMapper for OfErased<'_, M> {
    fn float(&mut self, dimensions: usize, param: Box<dyn Any>) -> Box<dyn Any> {
        for_dimensions!(dimensions, D => Box::new(self.0.map_float::<D>(owned(param))), [0 1 2 3 4 5 6 7 8])
    }

    fn int(&mut self, dimensions: usize, param: Box<dyn Any>) -> Box<dyn Any> {
        for_dimensions!(dimensions, D => Box::new(self.0.map_int::<D>(owned(param))), [0 1 2 3 4 5 6 7 8])
    }

    fn bool(&mut self, dimensions: usize, param: Box<dyn Any>) -> Box<dyn Any> {
        for_dimensions!(dimensions, D => Box::new(self.0.map_bool::<D>(owned(param))), [0 1 2 3 4 5 6 7 8])
    }

    fn flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        self.0.map_flag(flag)
    }

    fn enter(&mut self, name: &str, container: &str) {
        self.0.enter_module(name, container);
    }

    fn exit(&mut self, name: &str, container: &str) {
        self.0.exit_module(name, container);
    }
}
