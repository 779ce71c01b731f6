# The functions that compiled Rust calls and a C library would bring. SSE2 and no run-time dispatch.

.text
.global memcpy, memmove, memset, memcmp, bcmp, strlen

.balign 16
memmove:
    movq %rdi, %rax
    subq %rsi, %rax
    cmpq %rdx, %rax             # overlapping, the destination behind the source: copy from the end
    jb backwards
.balign 16
memcpy:
    movq %rdi, %rax
    cmpq $16, %rdx
    jb 3f
    cmpq $32, %rdx
    ja 1f
    movups (%rsi), %xmm0
    movups -16(%rsi,%rdx), %xmm1
    movups %xmm0, (%rdi)
    movups %xmm1, -16(%rdi,%rdx)
    ret
1:  cmpq $768, %rdx
    jae 4f
    movups -16(%rsi,%rdx), %xmm1 # the tail, read before anything is written
    leaq -16(%rdi,%rdx), %r8
2:  movups (%rsi), %xmm0
    movups %xmm0, (%rdi)
    addq $16, %rsi
    addq $16, %rdi
    cmpq %r8, %rdi
    jb 2b
    movups %xmm1, (%r8)
    ret
4:  movq %rdx, %rcx
    rep movsb
    ret
3:  cmpl $8, %edx
    jae 5f
    cmpl $4, %edx
    jae 6f
    testl %edx, %edx
    jz 7f
    movzbl (%rsi), %ecx
    movzbl -1(%rsi,%rdx), %r8d
    cmpl $2, %edx
    jbe 8f
    movzbl 1(%rsi), %r9d
    movb %r9b, 1(%rdi)
8:  movb %cl, (%rdi)
    movb %r8b, -1(%rdi,%rdx)
7:  ret
5:  movq (%rsi), %rcx
    movq -8(%rsi,%rdx), %r8
    movq %rcx, (%rdi)
    movq %r8, -8(%rdi,%rdx)
    ret
6:  movl (%rsi), %ecx
    movl -4(%rsi,%rdx), %r8d
    movl %ecx, (%rdi)
    movl %r8d, -4(%rdi,%rdx)
    ret

backwards:
    movq %rdi, %rax
    cmpq $16, %rdx
    jb 3b                       # up to 16 bytes are read before they are written
    movups (%rsi), %xmm1        # the head, likewise
1:  movups -16(%rsi,%rdx), %xmm0
    movups %xmm0, -16(%rdi,%rdx)
    subq $16, %rdx
    cmpq $16, %rdx
    ja 1b
    movups %xmm1, (%rdi)
    ret

.balign 16
memset:
    movq %rdi, %r9
    movq %rdx, %rcx
    movzbl %sil, %eax
    cmpq $64, %rdx
    ja 2f
    testq %rdx, %rdx
    jz 3f
1:  movb %al, (%rdi)
    incq %rdi
    decq %rcx
    jnz 1b
3:  movq %r9, %rax
    ret
2:  rep stosb
    movq %r9, %rax
    ret

.balign 16
memcmp:
bcmp:
    xorl %ecx, %ecx
1:  leaq 8(%rcx), %r8
    cmpq %rdx, %r8
    ja 2f
    movq (%rdi,%rcx), %rax
    movq (%rsi,%rcx), %r9
    cmpq %r9, %rax
    jne 4f
    movq %r8, %rcx
    jmp 1b
2:  cmpq %rdx, %rcx
    jae 3f
    movzbl (%rdi,%rcx), %eax
    movzbl (%rsi,%rcx), %r9d
    incq %rcx
    subl %r9d, %eax
    jz 2b
    ret
3:  xorl %eax, %eax
    ret
4:  bswapq %rax
    bswapq %r9
    cmpq %r9, %rax
    sbbl %eax, %eax             # -1 if below, else 0
    orl $1, %eax
    ret

.balign 16
strlen:
    xorl %eax, %eax
1:  cmpb $0, (%rdi,%rax)
    je 2f
    incq %rax
    jmp 1b
2:  ret
