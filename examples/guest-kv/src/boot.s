# CPL 0: everything here is short, because some hypervisors emulate it instruction by instruction.
# The VMM enters at pvh_entry in 32-bit protected mode without paging, EBX pointing to the start information.

.set KERNEL_CS, 0x08
.set KERNEL_DS, 0x10
.set USER_DS, 0x1b
.set USER_CS, 0x23
.set TSS, 0x28
.set IRQS, 24

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18              # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .boot, "ax"
.code32
.global pvh_entry
pvh_entry:
    cld
    movb $0xff, %al             # both 8259s: everything masked
    outb %al, $0x21
    outb %al, $0xa1
    movl $0x620, %eax           # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      # EFER.LME
    xorl %edx, %edx
    movl $0x100, %eax
    wrmsr
    movl $0x80010033, %eax      # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $KERNEL_CS, $start64

.code64
start64:
    movl $KERNEL_DS, %eax
    movl %eax, %ss
    movl $USER_DS, %eax
    movl %eax, %ds
    movl %eax, %es
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl $tss, %eax             # the descriptor splits the address, which no relocation can
    movl $gdt_tss, %ecx
    movw %ax, 2(%rcx)
    shrl $16, %eax
    movb %al, 4(%rcx)
    movb %ah, 7(%rcx)
    movl $TSS, %eax
    ltr %ax
    lidt idt_pointer
    movl $kernel_stack_top, %esp
    pushq $USER_DS
    pushq $__user_stack_top
    pushq $0x202                # IF
    pushq $USER_CS
    pushq $user_start
    movl %ebx, %edi
    iretq

# CPL 3 begins here; EDI still points to the start information.
user_start:
    movq %rdi, %rbx
    movl $__bss_start, %edi
    movl $__bss_end, %ecx
    subl %edi, %ecx
    xorl %eax, %eax
    rep stosb
    movq %rbx, %rdi
    xorl %ebp, %ebp
    call guest_main
    ud2

# hlt at CPL 3 is how the payload says "nothing to do". It wrote to ft_seen how many events it knew of before it
# looked for work: only if there was none since, the processor halts, with no gap between the comparison and the halt.
general_protection:
    cmpq $0, (%rsp)
    jne not_a_halt
    cmpq $USER_CS, 16(%rsp)
    jne not_a_halt
    pushq %rax
    movq 16(%rsp), %rax
    cmpb $0xf4, (%rax)
    jne not_a_halt_pop
    incq 16(%rsp)
    movl ft_events, %eax
    cmpl ft_seen, %eax
    jne 1f
    sti
    hlt
    cli
1:  popq %rax
    addq $8, %rsp
    iretq
not_a_halt_pop:
    popq %rax
not_a_halt:
    pushq $13

# Stack: vector, error code, RIP, ... The payload prints it at CPL 3, on its own stack, and does not come back.
fatal:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    movl $kernel_stack_top, %esp
    pushq $USER_DS
    pushq $__user_stack_top
    pushq $0x202
    pushq $USER_CS
    pushq $fatal_user
    iretq
fatal_user:
    call guest_exception
    ud2

.macro exception vector
exception_\vector:
    .if \vector == 13
    jmp general_protection
    .else
    .if \vector != 8 && (\vector < 10 || \vector > 14) && \vector != 17 && \vector != 21
    pushq $0
    .endif
    pushq $\vector
    jmp fatal
    .endif
.endm
.altmacro
.set i, 0
.rept 32
    exception %i
    .set i, i + 1
.endr

# A device: read its interrupt status and acknowledge it here, where an exit is cheapest. Acknowledged before the
# payload looks at the rings: what the device adds after this raises a new interrupt.
.macro irq number
irq_\number:
    pushq %rax
    pushq %rdx
    movl ft_irq_base + 8 * \number, %eax
    testl %eax, %eax
    jz 1f
    movl 0x60(%rax), %edx
    movl %edx, 0x64(%rax)
1:  incq ft_irq_count + 8 * \number
    jmp irq_done
.endm
.set i, 0
.rept IRQS
    irq %i
    .set i, i + 1
.endr

timer:
    pushq %rax
    pushq %rdx
    incq ft_timer_count
irq_done:
    incl ft_events
    movl $0xfee000b0, %eax      # EOI
    movl $0, (%rax)
    popq %rdx
    popq %rax
    iretq

spurious:
    iretq

# Addresses of the handlers; the payload makes the IDT out of them.
.section .boot_tables, "aw"
    .balign 8
.macro address prefix, number
    .quad \prefix\number
.endm
.global ft_exceptions
ft_exceptions:
.set i, 0
.rept 32
    address exception_, %i
    .set i, i + 1
.endr
.global ft_irqs
ft_irqs:
.set i, 0
.rept IRQS
    address irq_, %i
    .set i, i + 1
.endr
.noaltmacro
.global ft_timer
ft_timer:
    .quad timer
.global ft_spurious
ft_spurious:
    .quad spurious

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad ft_idt

    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # code, CPL 0, 64-bit
    .quad 0x00cf93000000ffff    # data, CPL 0
    .quad 0x00cff3000000ffff    # data, CPL 3
    .quad 0x00affb000000ffff    # code, CPL 3, 64-bit
gdt_tss:
    .word tss_end - tss - 1, 0
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_end:

# The I/O bitmap lets CPL 3 use ports 0 to 0xfff.
    .balign 8
tss:
    .long 0
    .quad kernel_stack_top
    .fill 88, 1, 0
    .word 0
    .word io_bitmap - tss
io_bitmap:
    .fill 512, 1, 0
    .byte 0xff
tss_end:

    .balign 4096
.global ft_idt
ft_idt:
    .fill 4096, 1, 0

# Identity map of 4 GiB in pages of 2 MiB: present, writable, user, accessed, dirty (so that the processor has nothing
# to write there); the highest GiB, where the devices are, not cached.
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
    .quad pd + 0x27, pd + 0x1027, pd + 0x2027, pd + 0x3027
    .fill 508, 8, 0
pd:
.set at, 0
.rept 1536
    .quad at + 0xe7
    .set at, at + 0x200000
.endr
.rept 512
    .quad at + 0xff
    .set at, at + 0x200000
.endr

.section .hot, "aw"
    .balign 4096
.global ft_events, ft_seen, ft_timer_count, ft_irq_base, ft_irq_count
ft_events:
    .long 0
ft_seen:
    .long 0
ft_timer_count:
    .quad 0
ft_irq_base:
    .fill IRQS, 8, 0
ft_irq_count:
    .fill IRQS, 8, 0
    .fill 4096 - 16 - 16 * IRQS, 1, 0
kernel_stack_top:
