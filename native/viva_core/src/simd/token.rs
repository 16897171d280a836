//! What the levels of all architectures share: tokens and their intrinsics.

/// A token: a type that can only be built where `$detector` finds the features
/// of its level, and the one place where kernels are compiled with them.
macro_rules! token {
    ($name:ident, $run:ident, $features:literal, $detector:ident, $($detected:tt),+) => {
        /// Proof that the CPU has the level's instructions.
        #[derive(Clone, Copy)]
        pub struct $name(());

        impl $name {
            pub fn detect() -> Option<$name> {
                ($($detector!($detected))&&+).then_some($name(()))
            }

            /// Runs `op` compiled for this level.
            #[inline(always)]
            pub fn dispatch<O: Op>(self, op: O) -> O::Output {
                // SAFETY: the token exists, so detection found every feature
                // that `run` is compiled with.
                unsafe { $run(self, op) }
            }
        }

        #[target_feature(enable = $features)]
        fn $run<O: Op>(token: $name, op: O) -> O::Output {
            op.run(token)
        }
    };
}

/// Wraps intrinsics of the token's level.
macro_rules! intrinsics {
    ($(fn $name:ident(self $(, $arg:ident: $ty:ty)*) $(-> $ret:ty)? $body:block)+) => {
        $(
            #[inline(always)]
            fn $name(self $(, $arg: $ty)*) $(-> $ret)? {
                // SAFETY: the token proves that the CPU has the instructions;
                // loads and stores touch exactly the arrays they are given.
                unsafe { $body }
            }
        )+
    };
}

pub(super) use {intrinsics, token};
