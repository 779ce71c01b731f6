//! The real pair: two processes, wires between network namespaces, a guest on KVM and on the model machine, and everything that may happen to them. One program for
//! all of it, so that its tests share the places for pairs on this host ([`tests::real::scene`]) and none waits for another program's last.

mod activate;
mod bad_input;
mod capture;
mod crash;
mod disk;
mod disk_faults;
mod disk_return;
mod etcd;
mod failpoints;
mod fault_loop;
mod faults;
mod harness;
mod kill;
mod memory;
mod moves;
mod overload;
mod redis_benchmark;
mod restart;
