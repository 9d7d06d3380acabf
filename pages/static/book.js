// A figure opens at full size, by a click or by the keyboard.
document.addEventListener('DOMContentLoaded', () => {
  const dialog = document.createElement('dialog'), button = document.createElement('button'), big = document.createElement('img')
  dialog.className = 'figure'
  button.append(big)
  dialog.append(button)
  dialog.addEventListener('click', () => dialog.close())
  document.addEventListener('keydown', event => { if (event.key === 'Escape') dialog.close() })
  document.body.append(dialog)
  for (const img of document.querySelectorAll('article img')) {
    const link = img.closest('a')
    if (link && link.href === img.src) link.replaceWith(img)
    else if (link) continue
    const enlarge = () => { big.src = img.src; big.alt = img.alt; dialog.setAttribute('aria-label', img.alt); dialog.showModal() }
    Object.assign(img, { tabIndex: 0, title: 'Enlarge' })
    img.setAttribute('role', 'button')
    img.addEventListener('click', enlarge)
    img.addEventListener('keydown', event => { if (event.key === 'Enter') enlarge() })
  }
  for (const caption of document.querySelectorAll('.caption[role=heading]')) caption.setAttribute('aria-level', 2)
  for (const box of document.querySelectorAll('.cell_output .output, div.highlight pre, .table-wrapper')) box.tabIndex = 0   // what scrolls can be reached
})
